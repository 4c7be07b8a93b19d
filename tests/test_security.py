"""Classes of faults that became CVEs in programs of this kind, each tried on this one. What others
hand on, a base, a template, an adapter or a bundle, decides nothing of what code runs here, and
writes nothing beside what was asked for. See tests/fuzz/ for what parsers are given."""

import ast
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
from jinja2 import TemplateError

from ship_ds.config import base_folder
from ship_ds.console import no_log
from ship_ds.errors import UserError
from ship_ds.export.requests import read_instructions
from ship_ds.files import Manifest
from ship_ds.model.loading import load_prompts
from ship_ds.parsing import is_folder_name
from ship_ds.runtime import compiled_ops
from ship_ds.runtime.op_cache import compiled_cache, op_cache
from ship_ds.template_limits import TemplateLimitError, within_limits
from tests.conftest import REPOSITORY, environment

PACKAGE = REPOSITORY / "ship_ds"
CODE = "open({sentinel!r}, 'a').write('ran')\n"


@cache
def every_call() -> list[tuple[str, ast.Call, str]]:
    """In the package: ("ship_ds/a.py", the call, what is called)."""
    return [
        (str(path.relative_to(REPOSITORY)), node, ast.unparse(node.func))
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


def calls(name: str) -> list[tuple[str, ast.Call]]:
    """Every call in the package of a function of this name."""
    return [(path, call) for path, call, called in every_call() if called.endswith(name)]


def keywords(call: ast.Call) -> dict[str, str]:
    return {str(one.arg): ast.unparse(one.value) for one in call.keywords}


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """A base that asks for its own code in every way that a file can, and what that code would
    write."""
    sentinel = tmp_path / "sentinel"
    base = Path(shutil.copytree(base_folder("embedded"), tmp_path / "base"))
    for name in ("modeling_mine", "configuration_mine", "tokenization_mine"):
        (base / f"{name}.py").write_text(CODE.format(sentinel=str(sentinel)))
    kernel = "mine/kernel@main"
    edit(
        base / "config.json",
        auto_map={
            "AutoConfig": "configuration_mine.Config",
            "AutoModelForCausalLM": "modeling_mine.Model",
        },
        trust_remote_code=True,
        attn_implementation=kernel,
        _attn_implementation=kernel,
        _attn_implementation_internal=kernel,
        _experts_implementation=kernel,
        _experts_implementation_internal=kernel,
        use_kernels=True,
    )
    edit(
        base / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_mine.Tokenizer", None]},
        trust_remote_code=True,
    )
    return base, sentinel


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


_PROGRAM = """
import socket, sys
def refuse(*_, **__):
    open({sentinel!r}, "a").write("connected")
    raise OSError("no connection is made")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = refuse
from ship_ds.cli import main
for arguments in {verbs!r}:
    assert main(arguments) == 0, arguments
import torch
from pathlib import Path
from ship_ds.model.loading import load_lm, load_prompts, load_tokenizer, read_settings
load_tokenizer({base!r})
load_prompts({base!r}, None)
assert read_settings(Path({base!r}))._attn_implementation is None
for quantisation in ("nf4", "none"):
    model = load_lm({base!r}, quantisation, torch.float32)
    assert type(model).__module__.startswith("transformers."), type(model)
"""


@pytest.mark.slow
def test_a_base_decides_no_code_that_runs(hostile: tuple[Path, Path], tmp_path: Path) -> None:
    """transformers CVE-2026-4372 and CVE-2026-5241, vLLM CVE-2025-66448, 2026-22807, 2026-27893:
    a plan, a training of a step, and each of our loaders read the base, in 4 bits and as it is,
    beside a stub of the package `kernels`, and none of them runs a line of either, or connects to
    anything."""
    base, sentinel = hostile
    stub = tmp_path / "stub" / "kernels"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text(CODE.format(sentinel=str(sentinel)))
    settings = [f"model.task_llm.base={base}", f"run.folder={tmp_path / 'run'}"]
    smoke = ["--config", "quickstart-smoke", *settings]
    verbs = [
        ["plan", *smoke, "--gpus", "1"],
        ["train", *smoke, "training.steps=1", "evaluation.ends_with_report=false"],
    ]
    program = _PROGRAM.format(sentinel=str(sentinel), verbs=verbs, base=str(base))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **environment(),
            "PYTHONPATH": f"{REPOSITORY}:{stub.parent}",
            "SHIP_DS_SYSTEM_MALLOC": "1",  # else the training starts the program again
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert not sentinel.exists(), sentinel.read_text()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_no_library_takes_a_kernel_from_the_hub(tmp_path: Path) -> None:
    """bitsandbytes 0.50 asks the package `kernels` for one as it is imported, on some processors;
    and nothing is looked up on a hub, whoever starts the program."""
    sentinel = tmp_path / "sentinel"
    (tmp_path / "kernels.py").write_text(CODE.format(sentinel=str(sentinel)))
    program = (
        "import ship_ds, os, importlib.util\n"
        "assert os.environ['HF_HUB_OFFLINE'] == '1'\n"
        "assert importlib.util.find_spec('kernels') is None\n"
        "try:\n    import kernels\nexcept ImportError:\n    pass\n"
    )
    variables = {k: v for k, v in environment().items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**variables, "PYTHONPATH": f"{REPOSITORY}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not sentinel.exists()


@pytest.mark.slow
def test_every_loader_of_transformers_refuses_remote_code_and_the_hub() -> None:
    refused = "{'local_files_only': True, 'trust_remote_code': False}"
    count = 0
    for path, call in calls(".from_pretrained"):
        if "LoraConfig" in ast.unparse(call.func) or "PeftModel" in ast.unparse(call.func):
            continue  # a folder of ours, with a file that is there
        passed = [ast.unparse(one.value) for one in call.keywords if one.arg is None]
        source = (REPOSITORY / path).read_text(encoding="utf-8")
        assert {"_FROM_FOLDER", "place", "local"} & set(passed), (path, ast.unparse(call))
        assert refused in source.replace('"', "'"), path
        count += 1
    assert count >= 6


def test_one_pickle_is_read_and_only_with_weights_only() -> None:
    """torch CVE-2025-32434 and CVE-2026-24747, transformers CVE-2026-1839."""
    ((path, call),) = calls("torch.load")
    assert path == "ship_ds/runtime/pickles.py" and keywords(call)["weights_only"] == "True"
    assert not calls("pickle.load") + calls("pickle.loads") + calls("joblib.load")


def test_no_pickle_travels_between_ranks() -> None:
    """SGLang CVE-2026-3059 and CVE-2026-3060."""
    for name in ("all_gather_object", "broadcast_object_list", "gather_object", "recv_object_list"):
        assert not calls(name), name


def endless() -> str:
    while True:
        pass


def escape() -> str:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    return str(_compile_jinja_template(template).render())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("render", "error", "message"),
    [
        (endless, TemplateLimitError, "more than 1 seconds of the processor"),
        (lambda: time.sleep(60) or "", TemplateLimitError, "stood still for 2 seconds"),
        (lambda: "x" * (10 << 30), TemplateLimitError, "more than 1024 MB"),
        (lambda: "x" * 2_000_000, TemplateLimitError, "letters"),
        (escape, TemplateError, "unsafe"),
    ],
    ids=["endless", "still", "as large as the memory", "a long text", "out of the sandbox"],
)
def test_a_template_is_bounded(
    render: Callable[[], str],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SGLang CVE-2026-5760, and what a sandbox allows: nested loops, and texts without end."""
    if "still" in message:
        monkeypatch.setattr("ship_ds.template_limits._PATIENCE", 2)
    with pytest.raises(error, match=message):
        within_limits(render, seconds=1)
    assert within_limits(lambda: "héllo \x00", seconds=30) == "héllo \x00"


def test_a_system_that_starts_no_child_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the template's fault, and no pipe stays open."""

    def refuses() -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fork", refuses)
    monkeypatch.setattr("ship_ds.prompt._RENDERED", {})
    with pytest.raises(UserError, match="Cannot allocate memory.*: end what else takes memory"):
        load_prompts("embedded", None)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_child_that_waits_is_no_endless_template() -> None:
    """As one whose files a busy disk has not read yet."""

    def late() -> str:
        time.sleep(1.5)
        return "here"

    assert within_limits(late, seconds=1) == "here"


def test_ctrl_c_unwinds_nothing_in_the_child(tmp_path: Path) -> None:
    """Where it would run the parent's clean-ups a second time."""

    def interrupted() -> str:
        raise KeyboardInterrupt

    parent, unwound = os.getpid(), tmp_path / "unwound"
    with pytest.raises(TemplateLimitError):
        try:
            within_limits(interrupted, seconds=5)
        except BaseException:
            if os.getpid() != parent:
                unwound.touch()
                os._exit(1)
            raise
    assert not unwound.exists()


def test_a_part_of_a_text_is_none() -> None:
    """Of a child that is killed, as for its memory, while it writes."""
    write = os.write

    def killed_as_it_writes() -> str:
        def part(file: int, data: bytes) -> int:
            write(file, data[:30])
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

        os.write = part
        return "x" * 100

    with pytest.raises(TemplateLimitError):
        within_limits(killed_as_it_writes, seconds=5)


def test_a_template_of_nested_loops_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ship_ds.prompt.within_limits", partial(within_limits, seconds=1))
    base = Path(shutil.copytree(base_folder("embedded"), tmp_path / "base"))
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (base / "chat_template.jinja").write_text(loops + "{{ messages[0].content }}")
    with pytest.raises(UserError, match="it takes more than 1 seconds") as caught:
        load_prompts(str(base), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/x",
        "a/b",
        "..",
        ".",
        ".hidden",
        "x\x00",
        "",
        "x" * 300,
        "x.part",
        "a\u2215b",
        "a b",
    ],
)
def test_a_name_leads_nowhere_else(name: str, tmp_path: Path) -> None:
    """MLflow CVE-2026-2614, Gradio CVE-2026-28414: ids of a file of instructions become folders."""
    assert not is_folder_name(name)
    path = tmp_path / "i.jsonl"
    path.write_text(json.dumps({"instruction": "k", "id": name}))
    if name:
        with pytest.raises(UserError, match="becomes a folder's name"):
            read_instructions(path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "x\x00"])
def test_a_manifest_lists_nothing_outside_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({name: {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(ValueError, match="leads out of the folder"):
        Manifest.read(tmp_path)


def test_others_can_write_nothing_that_a_program_makes(tmp_path: Path) -> None:
    """MLflow CVE-2026-4137 and CVE-2025-10279: under umask 000."""
    program = (
        "import os; os.umask(0)\n"
        "from ship_ds.files import refuse_other_writers, whole_folder, write_json\n"
        "from pathlib import Path\n"
        "refuse_other_writers()\n"
        f"root = Path({str(tmp_path)!r})\n"
        "write_json(root / 'run' / 'a.json', 1)\n"
        "with whole_folder(root / 'run' / 'bundle') as part:\n"
        "    (part / 'b').write_text('b')\n"
        "    assert not part.stat().st_mode & 0o002\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True)
    assert done.returncode == 0, done.stderr
    made = [*(tmp_path / "run").rglob("*"), tmp_path / "run"]
    assert len(made) == 4
    assert not [path for path in made if path.stat().st_mode & stat.S_IWOTH]
    starts = [PACKAGE / "cli" / "__init__.py", PACKAGE / "runtime" / "ranks.py"]
    assert all("    refuse_other_writers()" in start.read_text() for start in starts)


def test_compiled_ops_that_others_can_write_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ops"
    assert op_cache({"TORCH_EXTENSIONS_DIR": str(folder)}) == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    with pytest.raises(UserError, match="others can write what would be run from there"):
        op_cache({"TORCH_EXTENSIONS_DIR": str(folder)})
    with pytest.raises(UserError, match="set it to a folder that can be written"):
        op_cache({"TORCH_EXTENSIONS_DIR": "/dev/null/ops"})
    monkeypatch.setenv("HOME", "/nowhere/at/all")
    assert op_cache({}).parts[-2] == f"ship_ds-{os.getuid()}"


def test_what_torch_compiles_is_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From other users, whose folder torch's default in /tmp may be, and from machines with another
    processor, for which torch would take it."""
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")}
    own = compiled_cache(environment)
    assert own.parent == tmp_path / "ops" / "inductor" and own.is_dir()
    environment["TORCHINDUCTOR_CACHE_DIR"] = f"{tempfile.gettempdir()}/torchinductor_somebody"
    assert compiled_cache(environment) == own
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name : another\nflags : fpu avx2\n")
    monkeypatch.setattr("ship_ds.placement._PROCESSOR", tmp_path / "cpuinfo")
    others = [compiled_cache(environment)]
    (tmp_path / "cpuinfo").write_text("processor : 0\n")  # as of a system that says no more
    for node in ("a", "b"):
        monkeypatch.setattr(os, "uname", lambda node=node: ("Linux", node))
        others.append(compiled_cache(environment))
    assert len({own, *others}) == 4
    chosen = tmp_path / "chosen"
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(chosen)
    assert compiled_cache(environment) == chosen
    chosen.chmod(0o777)
    with pytest.raises(UserError, match="TORCHINDUCTOR_CACHE_DIR: .*: others can write"):
        compiled_cache(environment)


def test_a_training_compiles_into_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_me")
    monkeypatch.setenv("PATH", os.environ["PATH"])  # which it changes
    compiled_ops.build([], no_log)
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == tmp_path / "inductor"


def test_every_text_file_is_opened_as_utf_8() -> None:
    """Else a run under another locale ends at its bundle, or writes one that opens nowhere else."""
    for name in (".read_text", ".write_text"):
        for path, call in calls(name):
            if "importlib" not in path and "resources.files" not in ast.unparse(call.func):
                is_ours = len(call.args) > 1 or "encoding" in keywords(call) or name == "write_text"
                assert is_ours, (path, ast.unparse(call))
    for path, call in calls("open"):
        mode = [ast.unparse(one) for one in call.args if "'" in ast.unparse(one)]
        is_text = mode and set(mode[-1].strip("'")) <= set("rwax+t") and mode[-1].strip("'")
        assert not is_text or "encoding" in keywords(call), (path, ast.unparse(call))
