"""Published figures to stand beside ours: ratios with a loss, of abstracts, and the perplexities of one table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """ratio: compression ratio as the authors count it; loss_percent: accuracy loss as they state it, in percent;
    acceleration: on their array, where the abstract gives one.

    The abstracts state neither the data, nor how the ratio is counted, nor the baseline, nor whether the loss is in points or
    relative.
    """

    work: str
    ratio: float
    loss_percent: float
    source: str
    acceleration: float | None = None


PUBLISHED = (
    Published("Wu 2026", 38.4, 1.7, "Wu Hai, Jiang Lin, Li Yuancheng, Liu Pengfei: Telecommunication Engineering 66(1), 71-79, "
              "DOI 10.20079/j.issn.1001-893x.240926004 (loss: about)", 1.41),
    Published("Ji 2025", 32.8, 1.896, "Ji Chen, Jiang Lin, Li Yuancheng, Zhang Yixin: Journal of Guangxi University 50(6), "
              "1290-1303, DOI 10.13624/j.cnki.issn.1001-7445.2025.1290"),
)


@dataclass(frozen=True)
class PublishedSpeedUp:
    """Of pruning that keeps 1 / ratio of the weights, on an accelerator of its own."""

    work: str
    ratio: float
    speed_up: float
    source: str


PUBLISHED_SPEED_UP = PublishedSpeedUp("Wang S. 2019", 8.0, 7.82, "DOI 10.1109/ACCESS.2019.2917312: 97.8 % of the ideal")


@dataclass(frozen=True)
class PublishedPerplexity:
    """Penn Treebank, one layer of 300 units: float and quantised test perplexity as table 3 of the source gives them.

    in_training: whether the table says that the network was trained in its formats; None where it says nothing. How the
    widths are applied is not stated.
    """

    work: str
    cell: str
    weight_bits: int
    activation_bits: int
    float_perplexity: float
    perplexity: float
    in_training: bool | None


PERPLEXITY_SOURCE = (
    "Table 3 of Rapuano, Pacini, Fanucci: Computational Intelligence and Neuroscience 2022, 9485933 (PMC9117057), retracted in "
    "2023 according to its publisher's list (the notice itself was not seen); the method is reproduced here, its figures stand "
    "for comparison only. [n] are references of that article"
)
PUBLISHED_PERPLEXITIES = (
    PublishedPerplexity("Rapuano 2022 (retracted)", "LSTM", 11, 10, 92.8, 93.7, False),
    PublishedPerplexity("Rapuano 2022 (retracted)", "GRU", 8, 3, 91.3, 90.6, False),
    PublishedPerplexity("[13]", "LSTM", 3, 3, 89.8, 87.9, True),
    PublishedPerplexity("[13]", "GRU", 3, 3, 92.5, 92.9, True),
    PublishedPerplexity("[1]", "LSTM", 4, 4, 109.0, 114.0, True),
    PublishedPerplexity("[1]", "GRU", 4, 4, 100.0, 102.0, True),
    PublishedPerplexity("[41]", "LSTM", 4, 4, 97.0, 100.0, None),
    PublishedPerplexity("[42] HitNet", "LSTM", 2, 2, 97.2, 110.3, None),
)
