"""The worked example of the README runs as it stands there."""

import re

from conftest import REPOSITORY


def test_the_worked_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {"__name__": "example"})
    ratio, error, cycles = map(float, re.findall(r"[\d.]+\d", capsys.readouterr().out))
    assert 20 <= ratio < 25
    assert error < 0.02  # the variance of the targets is 1 / 120, a model that learnt nothing would show it
    assert cycles > 0
    assert (tmp_path / "model.packed.safetensors").stat().st_size < 8 * 6144
