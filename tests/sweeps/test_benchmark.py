"""The step's benchmark: a person measures a GPU with it, and it must say what it needs."""

import sys
from typing import Any

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


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_halved_until_it_does() -> None:
    tried = []

    def take(setting: benchmark.Setting) -> Any:
        tried.append(setting.sequences)
        if setting.sequences > 4:
            raise torch.OutOfMemoryError
        return setting.sequences

    assert benchmark.fitting(benchmark.CPU[0], take) == 4  # type: ignore[comparison-overlap]
    assert tried == [16, 8, 4]
