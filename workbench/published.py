"""Published compression ratios with an accuracy loss, to stand beside ours. Every figure was read in its source's abstract."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """ratio: compression ratio as the authors count it; loss_percent: accuracy loss as they state it, in percent.

    The abstracts state neither the data, nor how the ratio is counted, nor the baseline, nor whether the loss is in points or
    relative.
    """

    work: str
    ratio: float
    loss_percent: float
    source: str


PUBLISHED = (
    Published("Wu 2026", 38.4, 1.7, "Wu Hai, Jiang Lin, Li Yuancheng, Liu Pengfei: Telecommunication Engineering 66(1), 71-79, "
              "DOI 10.20079/j.issn.1001-893x.240926004 (loss: about)"),
    Published("Ji 2025", 32.8, 1.896, "Ji Chen, Jiang Lin, Li Yuancheng, Zhang Yixin: Journal of Guangxi University 50(6), "
              "1290-1303, DOI 10.13624/j.cnki.issn.1001-7445.2025.1290"),
)
