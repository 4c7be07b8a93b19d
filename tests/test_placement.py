"""`--device` and `--dtype`, with and without a GPU (a stub of torch's own answers)."""

import pytest
import torch

from ship_ds.errors import UserError
from ship_ds.placement import check_words, choose_device, choose_dtype


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, bf16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or bf16,
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")


def test_without_a_gpu_it_is_fp32_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    device = choose_device("auto")
    assert (device.type, choose_dtype(None, device)) == ("cpu", torch.float32)
    assert choose_dtype("auto", device) == torch.float32
    assert choose_dtype("bfloat16", device) == torch.bfloat16
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UserError, match=f"device {name}: torch .* sees no GPU here"):
            choose_device(name)


def test_with_one_it_is_bf16_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    device = choose_device("auto")
    assert (str(device), choose_dtype(None, device)) == ("cuda", torch.bfloat16)
    assert choose_dtype(torch.float32, device) == torch.float32
    assert str(choose_device("cuda:1")) == "cuda:1"
    assert str(choose_device(torch.device("cuda", 0))) == "cuda:0"
    assert choose_dtype(None, choose_device("cpu")) == torch.float32
    with pytest.raises(UserError, match=r"cuda:2: there are 2 GPU\(s\) here"):
        choose_device("cuda:2")


def test_a_gpu_without_bf16_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 1, bf16=False)
    assert choose_dtype(None, choose_device("auto")) == torch.float32
    with pytest.raises(UserError, match="dtype bfloat16: Tesla V100 does not compute in it"):
        choose_dtype("bfloat16", torch.device("cuda"))


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", "mps", ""])
def test_other_devices_are_one_line(device: str) -> None:
    with pytest.raises(UserError, match="expected auto, cpu, cuda or cuda:N"):
        check_words(device, "auto")


@pytest.mark.parametrize("dtype", ["float16", "bf16", "double"])
def test_other_types_are_one_line(dtype: str) -> None:
    with pytest.raises(UserError, match="expected auto, bfloat16 or float32"):
        choose_dtype(dtype, torch.device("cpu"))
