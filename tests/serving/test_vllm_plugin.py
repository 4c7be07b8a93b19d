"""vLLM's plugin: by vLLM's own classes where it is installed, else by two with their signatures
(vllm/lora/resolver.py and request.py of 0.32, read in November 2026)."""

import asyncio
import importlib.metadata
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ship_ds.api import Ship
from ship_ds.config import base_folder
from ship_ds.errors import UserError
from ship_ds.serving import vllm_plugin
from ship_ds.serving.vllm_plugin import InstructionResolver, register

pytestmark = pytest.mark.slow

TEXT = "reverse the list"


@dataclass
class _Request:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


class _Registry:
    resolvers: dict[str, Any]

    @classmethod
    def register_resolver(cls, resolver_name: str, resolver: Any) -> None:
        cls.resolvers[resolver_name] = resolver


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins, where there is no vLLM."""
    _Registry.resolvers = {}
    if importlib.util.find_spec("vllm") is None:
        names = ("vllm", "vllm.lora", "vllm.lora.resolver", "vllm.lora.request")
        modules = {name: ModuleType(name) for name in names}
        modules["vllm.lora.resolver"].LoRAResolver = type("LoRAResolver", (), {})  # type: ignore[attr-defined]
        modules["vllm.lora.resolver"].LoRAResolverRegistry = _Registry  # type: ignore[attr-defined]
        modules["vllm.lora.request"].LoRARequest = _Request  # type: ignore[attr-defined]
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    yield


def base_of(bundle: Path) -> str:
    """What `vllm serve` is given: the folder of the run's base."""
    config = json.loads((bundle / "config.json").read_text())
    return str(base_folder(config["model"]["task_llm"]["base"]))


def resolved(resolver: InstructionResolver, base: str, *names: str) -> list[Any]:
    """What these names become, asked at once."""

    async def ask() -> list[Any]:
        return list(await asyncio.gather(*(resolver.resolve_lora(base, name) for name in names)))

    return asyncio.run(ask())


def test_an_instruction_becomes_a_folder_that_peft_would_load(bundle: Path, ship: Ship) -> None:
    resolver = InstructionResolver(bundle)
    base = base_of(bundle)
    [made] = resolved(resolver, base, f"ship:{TEXT}")
    assert (made.lora_name, made.lora_int_id) == (f"ship:{TEXT}", 1)
    folder = Path(made.lora_path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert TEXT in (folder / "ship.json").read_text()
    written = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    [again] = resolved(resolver, base, f"ship:{TEXT}")
    assert again.lora_path == made.lora_path
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == written


def test_the_folder_that_vllm_serves_is_the_base(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the run's config says that it was; with settings of its own it is another model."""
    served = Path(shutil.copytree(base_of(bundle), tmp_path / "served"))
    opened: list[str | None] = []
    from_run = Ship.from_run

    def noted(path: Path, device: str, base: str | None = None) -> Ship:
        opened.append(base)
        return from_run(path, device, base=base)

    monkeypatch.setattr(Ship, "from_run", noted)
    [made] = resolved(InstructionResolver(bundle), str(served), f"ship:{TEXT}")
    assert made is not None and opened == [str(served)]
    path = served / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    assert resolved(InstructionResolver(bundle), str(served), f"ship:{TEXT}") == [None]
    assert len(opened) == 1


def test_servers_that_share_a_folder_make_one_adapter_at_once(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writes apart from the other, and the second takes what the first has put there."""
    first, second = (InstructionResolver(bundle, tmp_path) for _ in range(2))
    base, write, others = base_of(bundle), vllm_plugin._publish, list[Any]()

    def publish(part: Path, folder: Path) -> None:
        monkeypatch.setattr(vllm_plugin, "_publish", write)
        others.extend(resolved(second, base, f"ship:{TEXT}"))  # from beginning to end meanwhile
        write(part, folder)

    monkeypatch.setattr(vllm_plugin, "_publish", publish)
    [made] = resolved(first, base, f"ship:{TEXT}")
    assert [one.lora_path for one in others] == [made.lora_path]
    assert [path.name for path in tmp_path.iterdir()] == [Path(made.lora_path).name]


def test_what_is_no_instruction_of_ours_is_unknown(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Other names are none of ours; why an instruction cannot be read stands in the log."""
    resolver, base = InstructionResolver(bundle, max_characters=40), base_of(bundle)
    with caplog.at_level(logging.WARNING, "vllm.ship_ds"):
        names = ["reverse", "ship", "Ship:reverse", "ship:" + 41 * "x", "ship:", "ship:  "]
        assert resolved(resolver, base, *names) == [None] * len(names)
        assert resolved(resolver, base, "ship:frobnicate the list") == [None]
        assert resolved(resolver, "gpt2", f"ship:{TEXT}") == [None]
    lines = [record.getMessage() for record in caplog.records]
    assert any("is not in the base model's vocabulary" in line for line in lines)
    assert any(line.endswith(": serve that folder") for line in lines)
    assert all("\n" not in line for line in lines)


def test_a_folder_that_cannot_be_written_makes_the_name_unknown(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the start, or as it became later; once it is mended the next request has its adapter."""
    base, folder = base_of(bundle), tmp_path / "made"
    resolver = InstructionResolver(bundle, folder)
    folder.write_text("no folder")
    with caplog.at_level(logging.WARNING, "vllm.ship_ds"):
        assert resolved(resolver, base, f"ship:{TEXT}") == [None]
        folder.unlink()
        assert resolved(resolver, base, f"ship:{TEXT}")[0] is not None
        shutil.rmtree(folder)
        folder.write_text("no folder")
        assert resolved(resolver, base, "ship:double each") == [None]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and all("\n" not in line for line in lines)
    assert f"{folder}: File exists: no adapter was made; SHIP_DS_ADAPTERS has to be" in lines[0]
    assert "Not a directory: no adapter was made; SHIP_DS_ADAPTERS has to be" in lines[1]
    folder.unlink()
    folder.mkdir()
    assert resolved(resolver, base, "ship:double each")[0] is not None


def test_names_are_no_paths(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an instruction spells, its folder is a hash in the one folder; words that the
    encoder does not know are read here, too."""
    monkeypatch.setattr("ship_ds.inference.checks.check_instruction", lambda *_: None)
    resolver, base = InstructionResolver(bundle, tmp_path / "made"), base_of(bundle)
    before = {path for path in tmp_path.rglob("*") if "made" not in path.parts}
    names = ["ship:../../etc/passwd", "ship:/etc/passwd", "ship:a\0b", f"ship:{TEXT}"]
    made = resolved(resolver, base, *names)
    assert None not in made and len({one.lora_path for one in made}) == 4
    assert {path.parent for path in (tmp_path / "made").iterdir()} == {tmp_path / "made"}
    assert all(len(path.name) == 16 + 1 + 64 for path in (tmp_path / "made").iterdir())
    assert before == {path for path in tmp_path.rglob("*") if "made" not in path.parts}


def test_how_many_are_made_and_how_many_wait_is_bounded(bundle: Path) -> None:
    base = base_of(bundle)
    resolver = InstructionResolver(bundle, max_adapters=1)
    assert resolved(resolver, base, f"ship:{TEXT}")[0] is not None
    assert resolved(resolver, base, "ship:double each") == [None]
    assert resolved(resolver, base, f"ship:{TEXT}")[0] is not None, "the one that is there stays"
    crowded = InstructionResolver(bundle, max_pending=1)
    both = resolved(crowded, base, f"ship:{TEXT}", "ship:double each")
    assert [one is not None for one in both] == [True, False]
    assert resolved(crowded, base, "ship:double each")[0] is not None


def test_the_loop_goes_on_while_an_adapter_is_made(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM awaits us where it answers everybody."""
    resolver, release = InstructionResolver(bundle), threading.Event()
    monkeypatch.setattr(resolver, "_make", lambda *_: release.wait(30) and Path("/adapter"))

    async def ask() -> Any:
        pending = asyncio.ensure_future(resolver.resolve_lora("base", f"ship:{TEXT}"))
        await asyncio.sleep(0.05)
        assert not pending.done()
        release.set()
        return await pending

    assert asyncio.run(ask()).lora_path == "/adapter"


def test_it_registers_without_torch(bundle: Path) -> None:
    """In each of vLLM's processes, most of which never ask."""
    program = (
        "import sys, types\n"
        "sys.modules['torch'] = None  # an import of it raises\n"
        "registry = types.SimpleNamespace(register_resolver=lambda *a: print(a[0]))\n"
        "resolver = types.ModuleType('vllm.lora.resolver')\n"
        "resolver.LoRAResolver, resolver.LoRAResolverRegistry = object, registry\n"
        "for name in ('vllm', 'vllm.lora'): sys.modules[name] = types.ModuleType(name)\n"
        "sys.modules['vllm.lora.resolver'] = resolver\n"
        "from ship_ds.serving.vllm_plugin import register\n"
        "register()\n"
        "import os\n"
        "assert 'kernels' not in sys.modules and 'HF_HUB_OFFLINE' not in os.environ\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"SHIP_DS_RUN": str(bundle)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ship_ds\n", "")


def test_the_environment_says_what_it_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SHIP_DS_RUN", raising=False)
    register()
    assert not _Registry.resolvers, "no run, no resolver"
    given = {"SHIP_DS_RUN": "run", "SHIP_DS_ADAPTERS": str(tmp_path), "SHIP_DS_MAX_ADAPTERS": "7"}
    made = InstructionResolver.from_environment(given)
    assert (made.run, made.device, made.max_adapters, made.max_characters) == (
        Path("run"),
        "cpu",
        7,
        4096,
    )
    for wrong in ("0", "-1", "many", "1e3"):
        with pytest.raises(UserError, match="SHIP_DS_MAX_PENDING=.*: expected a number from 1 on"):
            InstructionResolver.from_environment(given | {"SHIP_DS_MAX_PENDING": wrong})
    monkeypatch.setenv("SHIP_DS_RUN", "run")
    monkeypatch.setenv("SHIP_DS_MAX_PENDING", "many")
    with caplog.at_level(logging.ERROR, "vllm.ship_ds"):
        register()
    assert "SHIP_DS_MAX_PENDING=many" in caplog.text


def test_vllm_finds_it_by_its_entry_point() -> None:
    [entry] = importlib.metadata.entry_points(group="vllm.general_plugins", name="ship_ds")
    assert entry.load() is vllm_plugin.register
