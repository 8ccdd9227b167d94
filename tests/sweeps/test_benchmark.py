"""The step's benchmark: a person measures a GPU with it, and it must say what it needs."""

import sys

import pytest
import torch

from sweeps import benchmark


def test_a_gpu_that_is_not_there_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cuda"])
    with pytest.raises(SystemExit) as caught:
        benchmark.main()
    assert caught.value.code == 2
    assert "--device cuda: this torch finds no GPU here. Leave it out" in capsys.readouterr().err
