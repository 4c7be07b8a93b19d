"""`--device` and `--dtype`, with and without a GPU (a stub of torch's own answers)."""

from pathlib import Path

import pytest
import torch

from ship_ds import placement
from ship_ds.errors import UserError
from ship_ds.placement import check_words, choose_device, choose_dtype, multiplies_in_bf16


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


PROCESSORS = {
    "a Xeon with AMX": ("processor: 0\nflags\t\t: fpu avx2 avx512f amx_bf16 amx_tile\n", True),
    "an EPYC of Zen 4": ("flags\t\t: fpu avx2 avx512f avx512_bf16\nflags\t\t: fpu\n", True),
    "an EPYC of Zen 3": ("flags\t\t: fpu fma avx2\nvmx flags\t: bf16\n", False),
    "a Xeon with AVX-512 alone": ("flags\t\t: avx512f avx512bw\nbugs\t\t: bf16\n", False),
    "a Graviton 3": ("processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\n", True),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_says_whether_it_multiplies_in_bf16(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, has_bf16 = PROCESSORS[name]
    gpus(monkeypatch, 0)
    monkeypatch.setattr(placement, "_PROCESSOR", tmp_path / "cpuinfo")
    assert not multiplies_in_bf16(torch.device("cpu"))  # where the system says nothing
    (tmp_path / "cpuinfo").write_text(text)
    assert multiplies_in_bf16(torch.device("cpu")) is has_bf16
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    choose_dtype("float32", torch.device("cpu"))
    line = "ship-ds: dtype bfloat16: this processor only imitates it: float32 is many times faster"
    assert capsys.readouterr().err.splitlines() == ([] if has_bf16 else [line])


def test_the_gpu_decides_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "_PROCESSOR", tmp_path / "none")
    gpus(monkeypatch, 1)
    assert multiplies_in_bf16(torch.device("cuda"))
    gpus(monkeypatch, 1, bf16=False)
    assert not multiplies_in_bf16(torch.device("cuda"))


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", "mps", ""])
def test_other_devices_are_one_line(device: str) -> None:
    with pytest.raises(UserError, match="expected auto, cpu, cuda or cuda:N"):
        check_words(device, "auto")


@pytest.mark.parametrize("dtype", ["float16", "bf16", "double"])
def test_other_types_are_one_line(dtype: str) -> None:
    with pytest.raises(UserError, match="expected auto, bfloat16 or float32"):
        choose_dtype(dtype, torch.device("cpu"))
