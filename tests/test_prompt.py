"""The prompt format: which text, which labels, with and without a chat template, and its hash."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ship_ds import prompt
from ship_ds.api import Ship
from ship_ds.config import base_folder, load_config
from ship_ds.console import no_log
from ship_ds.data.source import source_of
from ship_ds.data.task import Example, Reading, Splits, SplitTask, Task
from ship_ds.errors import UserError
from ship_ds.evaluation.harness import Run
from ship_ds.inference.checks import check_text
from ship_ds.model.batch import TokenBatch
from ship_ds.model.generation import greedy
from ship_ds.model.language_model import language_model
from ship_ds.model.loading import check_models, load_prompts, load_tokenizer
from ship_ds.model.search import beam_search
from ship_ds.prompt import ROLES, PromptFormat, check_tasks, describe_roles, is_described
from ship_ds.train import Trainer
from tests.conftest import REPOSITORY
from tests.model.models import tiny_lm


def _bytes_tokenizer(**more: str) -> PreTrainedTokenizerBase:
    """One token a byte, so that nothing of a text is lost (the embedded tokenizer drops
    punctuation)."""
    alphabet = sorted(ByteLevel.alphabet())
    inner = Tokenizer(BPE({token: i for i, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", **more
    )
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}: {{ message['content'] }}]{% endfor %}"
        "{% if add_generation_prompt %}[assistant: {% endif %}"
    )
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return _bytes_tokenizer()


def _text(prompts: PromptFormat, ids: Any) -> str:
    return prompts.tokenizer.decode(list(ids))


def _without_template(tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    tokenizer.chat_template = None
    return PromptFormat(tokenizer)


def test_chat_template_wraps_the_users_text(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = PromptFormat(tokenizer)
    assert (
        _text(prompts, prompts.task_prompt("3", "double it"))
        == "[user: instruction: double it\ninput: 3][assistant: "
    )


@pytest.mark.parametrize("message", ["", "Be brief."])
def test_system_message_is_the_first_turn_of_every_prompt(
    tokenizer: PreTrainedTokenizerBase, message: str
) -> None:
    prompts, bare = PromptFormat(tokenizer, message), PromptFormat(tokenizer)
    for name, ids in bare.samples().items():
        said = f"[system: {message}]" if name != "target" else ""
        assert _text(prompts, prompts.samples()[name]) == said + _text(bare, ids)
    assert prompts.describe()["hash"] != bare.describe()["hash"]


def test_system_message_that_cannot_be_given_is_one_line(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    users = "[{{ messages[-1]['content'] }}]"
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No') }}{% endif %}"
    for template, message in (
        (refuses + users, r"with model.system_message \(No\); leave it out, or mend"),
        (users, "leaves model.system_message out; leave that out as well"),
        (None, "there is none for model.system_message; leave that out"),
    ):
        tokenizer.chat_template = template
        PromptFormat(tokenizer)
        with pytest.raises(UserError, match=message):
            PromptFormat(tokenizer, "Be brief.")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('A system turn') }}",
            r"without model.system_message \(A system turn\)",
        ),
        ("{% if %}", r"cannot be rendered without model.system_message \(Expected"),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "user's text 2 times"),
        ("hello", "user's text 0 times, not once; mend the template"),
        ("{{ 1 / 0 }}", r"\(division by zero\); mend the template, or remove it"),
        (
            "{% if messages[0]['role'] != 'system' %}{{ raise_exception('Say') }}{% endif %}"
            "{{ messages[-1]['content'] }}",
            r"\(Say\); set model.system_message, or mend the template",
        ),
        ({"rag": "x", "tool_use": "y"}, "of rag, tool_use, none is named default; name one so"),
    ],
)
def test_template_that_cannot_wrap_a_text_is_one_line(
    tokenizer: PreTrainedTokenizerBase, template: Any, message: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message) as error:
        PromptFormat(tokenizer)
    assert "\n" not in str(error.value)


def test_a_template_that_draws_draws_the_same_in_every_process(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = "{{ range(100000) | random }} {{ messages[0]['content'] }}"
    drawn = set()
    for _ in range(2):
        monkeypatch.setattr(prompt, "_RENDERED", {})  # what another process would not have
        drawn.add(PromptFormat(tokenizer).before)
        random.random()  # of the state that a child inherits
    assert len(drawn) == 1


def test_embedded_model_has_a_chat_template() -> None:
    prompts = PromptFormat(load_tokenizer("embedded"))
    assert prompts.before and prompts.after


def test_base_model_without_a_template_gets_the_text_and_a_line_end(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompts = _without_template(tokenizer)
    assert _text(prompts, prompts.task_prompt("3")) == "input: 3\n"
    assert (
        _text(prompts, prompts.task_prompt("3", "double it"))
        == "instruction: double it\ninput: 3\n"
    )
    assert _text(prompts, prompts.encoder_prompt("double it")) == "instruction: double it\n"


def test_begin_of_sequence_token_is_kept_without_a_template(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.bos_token = tokenizer.eos_token
    assert _without_template(tokenizer).task_prompt("3")[0] == tokenizer.eos_token_id


def test_shots_precede_the_input(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = _without_template(tokenizer)
    shots = [Example("1", "2"), Example("2", "4")]
    assert (
        _text(prompts, prompts.task_prompt("3", shots=shots))
        == "input: 1\noutput: 2\ninput: 2\noutput: 4\ninput: 3\n"
    )


def test_decoder_reads_the_published_sentence(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = _without_template(tokenizer)
    assert (
        _text(prompts, prompts.decoder_prompt([Example("1", "2")]))
        == "input: 1, target: 2. This task is to:\n"
    )
    assert _text(prompts, prompts.decoder_prompt(())) == "This task is to:\n"


def test_the_prompts_of_instruction_induction_are_the_published_ones(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompts = _without_template(tokenizer)
    ids = prompts.published_task_prompt("cold", "Write the opposite.")
    assert _text(prompts, ids) == "Instruction: Write the opposite.\nInput: cold\nOutput:\n"
    pairs = [Example(one, other) for one, other in ("ab", "cd", "ef", "gh", "ij")]
    assert _text(prompts, prompts.published_induction_prompt(pairs)) == (
        "I gave a friend an instruction and five inputs. The friend read the instruction and wrote "
        "an output for every one of the inputs.\nHere are the input-output pairs:\n\n"
        "Input: a\nOutput: b\n\nInput: c\nOutput: d\n\nInput: e\nOutput: f\n\n"
        "Input: g\nOutput: h\n\nInput: i\nOutput: j\n\nThe instruction was\n"
    )


def test_labels_are_on_the_target_and_its_end_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = PromptFormat(tokenizer)
    asked, target = prompts.task_prompt("3 1"), prompts.target("1 3")
    assert target[-1] == tokenizer.eos_token_id and prompts.eos_id not in target[:-1]
    batch = TokenBatch.build(
        [asked, prompts.task_prompt("3")], [target, prompts.target("3")], prompts.pad_id, 2
    )
    is_first_K = batch.label_row_K == 0
    columns = batch.padded.column_K[is_first_K] + 1
    first = 2 + len(asked)
    assert columns.tolist() == list(range(first, first + len(target)))
    assert batch.labels_K[is_first_K].tolist() == list(target)


def test_text_ends_at_the_first_end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = PromptFormat(tokenizer)
    assert prompts.text([*prompts.target("1 2"), *prompts.target("9")]) == "1 2"
    assert prompts.text(prompts.target("1 2")[:-1]) == "1 2"


def test_hash_changes_with_what_the_model_would_read(tokenizer: PreTrainedTokenizerBase) -> None:
    with_template = PromptFormat(tokenizer).describe()
    assert with_template == PromptFormat(_bytes_tokenizer()).describe()
    tokenizer.chat_template = str(tokenizer.chat_template) + "!"
    hashes = {
        with_template["hash"],
        PromptFormat(tokenizer).describe()["hash"],
        _without_template(tokenizer).describe()["hash"],
    }
    assert len(hashes) == 3


def _roles(prompts: PromptFormat, **others: PromptFormat) -> dict[str, PromptFormat]:
    return dict.fromkeys(ROLES, prompts) | others


def test_description_shows_what_each_model_reads(tokenizer: PreTrainedTokenizerBase) -> None:
    assert _without_template(tokenizer).describe()["samples"] == {
        "input": "input: 3 1\n",
        "instruction and input": "instruction: add 2 to it\ninput: 3 1\n",
        "examples and input": ("input: 1 4\noutput: 3 6\ninput: 5\noutput: 7\ninput: 3 1\n"),
        "encoder": "instruction: add 2 to it\n",
        "decoder": "This task is to:\n",
        "decoder with examples": (
            "input: 1 4, target: 3 6. input: 5, target: 7. This task is to:\n"
        ),
        "target": "5 3</s>",
    }


@pytest.mark.parametrize("text", ["instruction: ", "input: ", "output: ", ", target: "])
def test_no_change_of_the_code_goes_unseen(
    text: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if this text were written otherwise wherever the format puts it."""
    before = PromptFormat(tokenizer).describe()
    tokenise = PromptFormat._tokenise
    monkeypatch.setattr(
        PromptFormat, "_tokenise", lambda self, line: tokenise(self, line.replace(text, "<>"))
    )
    assert PromptFormat(tokenizer).describe()["hash"] != before["hash"]


@pytest.mark.parametrize("role", ROLES)
def test_the_tokenizer_of_each_role_counts(role: str, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts, other = PromptFormat(tokenizer), PromptFormat(load_tokenizer("embedded"))
    saved = json.loads(json.dumps(describe_roles(_roles(prompts))))
    assert is_described(saved, _roles(PromptFormat(_bytes_tokenizer())))
    assert not is_described(saved, _roles(prompts, **{role: other}))


def test_a_description_of_0_1_0_is_compared_with_its_like() -> None:
    folder = REPOSITORY / "tests" / "fixtures" / "v0_1" / "run" / "bundle"
    saved = json.loads((folder / "prompt_format.json").read_text())
    embedded = PromptFormat(load_tokenizer("embedded"))
    assert saved["version"] == 1 and is_described(saved, _roles(embedded))
    assert not is_described(saved | {"after": "?"}, _roles(embedded))
    assert not is_described(saved, _roles(PromptFormat(_bytes_tokenizer())))


def test_tokenizer_without_an_end_of_sequence_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no eos_token"):
        PromptFormat(tokenizer)


def test_what_an_encoder_reads_of_examples(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts, pairs = PromptFormat(tokenizer), (Example("3 1", "1 3"), Example("5", "5"))
    shown = "input: 3 1\noutput: 1 3\ninput: 5\noutput: 5"
    for read, text in (
        (Reading("sort it"), "instruction: sort it"),
        (Reading("sort it", pairs), f"instruction: sort it\n{shown}"),
        (Reading(None, pairs), shown),
        (Reading(None, pairs, states_targets=False), "input: 3 1\ninput: 5"),
    ):
        assert _text(prompts, prompts.encoder_prompt(read)) == f"[user: {text}][assistant: "
    assert prompts.encoder_prompt("sort it") == prompts.encoder_prompt(Reading("sort it"))


def test_an_encoder_that_reads_examples_is_described_by_them(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """And one that reads none as ever, so that bundles of before are of its format."""
    prompts = PromptFormat(tokenizer)
    before = prompts.describe()
    prompts.reads_examples = True
    described = prompts.describe()
    assert described["hash"] != before["hash"]
    assert described["samples"].keys() - before["samples"].keys() == {
        "encoder with examples",
        "encoder with inputs",
    }


@pytest.mark.parametrize("text", ["say </s> now", "</s>", "<pad>a</s>", "[user: </s>]"])
def test_a_control_token_written_out_is_text(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """In what is asked, shown and answered: it ends nothing, and comes back as it was written."""
    prompts = PromptFormat(tokenizer)
    control = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    example = Example(text, text)
    for ids in (
        prompts.task_prompt(text, text, (example,)),
        prompts.encoder_prompt(Reading(text, (example,))),
        prompts.decoder_prompt((example,)),
    ):
        assert not control & set(ids) and text in _text(prompts, ids)
    target = prompts.target(text)
    assert prompts.eos_id not in target[:-1] and target[-1] == prompts.eos_id
    assert prompts.finished_text(target) == text


def test_what_another_stack_reads_ends_by_itself(tokenizer: PreTrainedTokenizerBase) -> None:
    """As T5 was trained to read; a template says how prompts end, where there is one."""
    tokenizer.chat_template = None
    plain, read = PromptFormat(tokenizer), PromptFormat(tokenizer, ends_prompts=True)
    before = plain.task_prompt("3 1", "add 2")
    asked = read.task_prompt("3 1", "add 2")
    assert asked[-1] == read.eos_id and asked.count(read.eos_id) == 1
    assert before.count(plain.eos_id) == 0 and _text(read, asked[:-1]) + "\n" == _text(
        plain, before
    )
    assert plain.describe()["hash"] != read.describe()["hash"]


def _unigram_prompts() -> PromptFormat:
    """A vocabulary that holds its control tokens as pieces, as T5's."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in "abc </s>?")]
    inner = Tokenizer(Unigram(list(dict(pieces).items()), 0, False))
    return PromptFormat(
        PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    )


@pytest.mark.parametrize(
    ("prompts", "text"),
    [(PromptFormat(load_tokenizer("embedded")), "3 <eos> 4"), (_unigram_prompts(), "ab </s> c")],
    ids=["WordLevel", "Unigram"],
)
def test_a_control_token_that_no_letters_spell_is_refused(prompts: PromptFormat, text: str) -> None:
    token, example = str(prompts.tokenizer.eos_token), Example(text, text)
    assert prompts.acting_token(text) == token
    for read in (
        lambda: prompts.target(text),
        lambda: prompts.task_prompt(text),
        lambda: prompts.encoder_prompt(text),
        lambda: prompts.decoder_prompt((example,)),
    ):
        with pytest.raises(UserError, match=f"{token}.* is a control token") as error:
            read()
        assert "\n" not in str(error.value)
    plain = text.replace(token, "")
    assert prompts.acting_token(plain) is None and prompts.target(plain)[-1] == prompts.eos_id


def test_users_may_write_what_data_may_hold(tokenizer: PreTrainedTokenizerBase) -> None:
    """One rule for `Ship`, its verbs and the server, and for data and evaluation."""
    letters, words = PromptFormat(tokenizer), PromptFormat(load_tokenizer("embedded"))
    for text in ("say </s>", "<pad>", "3 <eos> 4"):
        check_text(letters, text, "input 1")
        assert letters.acting_token(text) is None
    for text, token in (("3 <eos> 4", "<eos>"), ("<pad>", "<pad>"), ("<user> 3", "<user>")):
        with pytest.raises(UserError, match=f"^input 1: '{token}' is a control token"):
            check_text(words, text, "input 1")
        assert words.acting_token(text) == token
    # No token stands in this word, which is read as one that is unknown.
    assert words.acting_token("3<eos>4") is None
    with pytest.raises(UserError, match="^input 1: '3<eos>4' is not in the base model's vocab"):
        check_text(words, "1 3<eos>4", "input 1")


def test_an_end_that_stands_for_unknown_words_too_is_letters() -> None:
    """As in GPT-2, whose bytes never need a token for unknown words."""
    prompts = PromptFormat(_bytes_tokenizer(unk_token="</s>"))
    check_text(prompts, "say </s>", "input 1")


def test_an_unknown_word_is_no_control_token_unless_it_ends() -> None:
    embedded = PromptFormat(load_tokenizer("embedded"))
    assert embedded.acting_token("<unk> 3") is None
    assert embedded.target("<unk> 3") == embedded.target("qwerty 3")
    inner = Tokenizer(WordLevel({"<end>": 0, "3": 1}, "<end>"))
    inner.pre_tokenizer = WhitespaceSplit()
    ends = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<end>")
    assert PromptFormat(ends).acting_token("3 <end>") == "<end>"


def test_a_task_that_cannot_be_spelled_is_refused_with_its_place(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """By training and by the evaluation, before either tokenises it."""
    embedded = PromptFormat(load_tokenizer("embedded"))
    fine, bad = Example("1", "2"), Example("3 <eos> 4", "5")
    whole = SplitTask(Task("t", "add 2", (fine, fine), source="a.jsonl:7"), (fine,), (fine,))
    check_tasks([embedded], Splits((whole,), (), ()))
    for part, task in (
        ("input '3 <eos> 4'", replace(whole, train=(fine, bad))),
        ("target '<pad>'", replace(whole, test=(Example("1", "<pad>"),))),
        ("target '<pad>'", replace(whole, test=(Example("1", "2", ("2", "<pad>")),))),
        ("instruction 'add <eos>'", replace(whole, held_out_paraphrases=("add <eos>",))),
    ):
        for splits in (Splits((), (task,), ()), Splits((whole,), (), (task,))):
            check_tasks([PromptFormat(tokenizer)], splits)
            with pytest.raises(UserError, match=f"^a.jsonl:7: task t: {part}: '<"):
                check_tasks([PromptFormat(tokenizer), embedded], splits)


def test_training_and_evaluation_refuse_what_cannot_be_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"id": f"t{i}", "instruction": f"add {i}", "examples": [{"input": "3", "target": "4"}] * 4}
        for i in range(4)
    ]
    rows[2]["examples"] = [{"input": f"{i}", "target": "5 <eos> 6"} for i in range(4)]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data={{kind: files, path: {path}, filters: {{min_examples_per_task: 1}}}}"
    config = load_config("quickstart-smoke", [data])
    line = f"^{path}:3: task t2: target '5 <eos> 6': '<eos>' is a control token"
    trainer = object.__new__(Trainer)
    trainer.config = config
    with pytest.raises(UserError, match=line):
        trainer.read_data(source_of(config.data), check_models(config.model))
    prompts = PromptFormat(load_tokenizer("embedded"))
    collator = SimpleNamespace(prompts=SimpleNamespace(**dict.fromkeys(ROLES, prompts)))
    ship = SimpleNamespace(config=config, model=SimpleNamespace(prompts=prompts, collator=collator))
    monkeypatch.setattr(Ship, "from_run", lambda *_: ship)
    with pytest.raises(UserError, match=line):
        Run.open(tmp_path, no_log)


def test_the_templates_own_control_tokens_stay_so(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "</s>{{ messages[0]['content'] }}<pad>"
    prompts = PromptFormat(tokenizer)
    ids = prompts.task_prompt("say </s>")
    assert ids[0] == prompts.eos_id and ids[-1] == tokenizer.pad_token_id
    assert ids.count(prompts.eos_id) == 1


def test_a_template_that_tells_the_time_is_told_the_same_day(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y %H:%M:%S') }} {{ messages[0]['content'] }}"
    assert PromptFormat(tokenizer).before == "26 Jul 2024 00:00:00 "


def test_padding_that_the_model_does_not_embed_is_not_used(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert isinstance(ids[0], int) and isinstance(ids[1], int)
    assert PromptFormat(tokenizer, vocabulary_size=max(ids) + 1).pad_id == ids[1]
    assert ids[0] < ids[1] and PromptFormat(tokenizer, vocabulary_size=ids[1]).pad_id == ids[0]
    with pytest.raises(UserError, match=f"eos_token is id {ids[0]}, and the model embeds 9 tokens"):
        PromptFormat(tokenizer, vocabulary_size=9)


def test_a_bases_answer_ends_by_any_token_that_its_generation_config_names(tmp_path: Path) -> None:
    """As Gemma's <end_of_turn>: the tokenizer's eos is another."""
    base = Path(shutil.copytree(base_folder("embedded"), tmp_path / "base"))
    plain = load_prompts(str(base), None)
    path = base / "generation_config.json"
    other = plain.pad_id
    path.write_text(json.dumps({"eos_token_id": [plain.eos_id, other]}))
    prompts = load_prompts(str(base), None)
    assert (plain.other_ends, prompts.other_ends) == ((), (other,))
    assert plain.describe() == prompts.describe()  # of what is read, not of what ends it


@pytest.mark.parametrize("num_beams", [1, 2])
def test_another_end_is_an_end(num_beams: int) -> None:
    """What the model would write first, taken for an end: the answer is empty, and finished."""
    torch.manual_seed(0)
    model: Any = tiny_lm("llama")
    lm = language_model(model.eval())
    prompts = TokenBatch.build([[3, 4, 5], [6, 7]], None, 0)

    def texts(*ends: int) -> list[tuple[int, ...]]:
        stream = lm.stream(prompts)
        if num_beams == 1:
            return [tuple(one) for one in greedy(stream, 1, 4, ends)]
        searches = beam_search(stream, num_beams, 1, 4, other_ends=ends)
        return [tuple(beams[0].tokens) for beams in searches]

    first = lm.stream(prompts).logits_EV.argmax(-1).tolist()
    assert 1 not in first and texts() != texts(*first)
    assert not {*first} & {token for tokens in texts(*first) for token in tokens}
    if num_beams == 1:
        assert texts(*first) == [(1,), (1,)]
