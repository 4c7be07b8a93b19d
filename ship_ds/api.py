"""What a program does with a trained run: instructions to adapters and answers, examples to
instructions. Plain types go in; frozen dataclasses come out.

    from ship_ds import Ship

    ship = Ship.from_run("runs/quickstart")
    ship.answer("keep the numbers greater than 4", ["3 9 5"])       # ["9 5"]
    ship.induce([("3 9 5", "9 5"), ("1 7", "7")]).instruction

Letters: C candidates, T tasks, Z latent size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ship_ds.bundle import Bundle, check_bases, frozen_bases
from ship_ds.config import Config
from ship_ds.console import Log, no_log
from ship_ds.data.source import source_of
from ship_ds.data.task import Example, Reading, SplitTask
from ship_ds.errors import UserError
from ship_ds.inference import checks
from ship_ds.inference.adapter_reading import read_adapter, read_merged
from ship_ds.inference.analogies import share_in_slots
from ship_ds.inference.bank import Bank
from ship_ds.inference.confidence import Calibration, Confidence, agreement, calibrate_confidence
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.deduction import answer_bare, answer_latents, answer_read
from ship_ds.inference.derived import Derived
from ship_ds.inference.example_index import ExampleIndex
from ship_ds.inference.explaining import HALF, Threshold, explain_many, made_up
from ship_ds.inference.explaining import calibrate as calibrate_explaining
from ship_ds.inference.induction import induce_many
from ship_ds.inference.latents import Familiarity, Neighbour, Surroundings, nearest_known
from ship_ds.inference.lora_reader import LoraReader, can_read, train_reader
from ship_ds.inference.prompt_following import PromptFollowing, measure_prompt_following
from ship_ds.inference.reasoning import reason_many
from ship_ds.inference.results import (
    Candidate,
    Explained,
    Explanation,
    Induction,
    Reasoning,
)
from ship_ds.model import budget
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.nf4_linear import unpack
from ship_ds.model.ship import ShipModel
from ship_ds.placement import choose_device, choose_dtype

__all__ = [
    "Calibration",
    "Candidate",
    "Confidence",
    "Deduction",
    "Explained",
    "Explanation",
    "Familiarity",
    "Induction",
    "InductionConfig",
    "Neighbour",
    "Pair",
    "Reasoning",
    "Ship",
    "Threshold",
]

Pair = tuple[str, str]
"""An example: (input, target)."""
_PROBES_OF_0_1_0 = ("3 7 3 5", "1 3 9 3 0")
"""Lists of digits, as in the generated rules, for bundles that carry no probes of their own."""


@dataclass(frozen=True)
class Deduction:
    """What an instruction becomes.

    Args:
        instruction: As it was given; of examples alone, as the decoder reads it out of the latent.
        latent: The mean of its posterior, Z numbers.
        adapter: What the hypernetwork makes of that.
        familiarity: How the instruction lies among those that were trained on; its `is_far` warns
            that the adapter may not do what the text says. None where the bundle knows fewer than
            two instructions.
        reading: What the encoder read where that was more than the instruction; else None.
    """

    instruction: str
    latent: tuple[float, ...]
    adapter: Adapter
    familiarity: Familiarity | None
    reading: Reading | None = None


_OF_FOLLOWING = {
    "ranks_in_prompt": "candidates are ranked through the encoder alone",
    "asks_task_llm": "it is asked for no text",
}
"""What a search does by itself where the Task LLM follows text in its prompt; and what is said
where it does not."""


class Ship:
    """A trained run, opened from its folder.

    Every method raises UserError, with a message of one line, for text that the models cannot read:
    an empty instruction, a word outside the vocabulary, a prompt longer than the context.

    Args:
        model: With its trained weights.
        config: Of the run.
        digest: SHA-256 of the trained weights.
        known: Instructions that the run was trained on.
        probes: Inputs of these tasks.
        derived: What is kept beside the bundle; None for a run that was not opened from one.
    """

    def __init__(
        self,
        model: ShipModel,
        config: Config,
        digest: str,
        known: Sequence[str] = (),
        probes: Sequence[str] = (),
        derived: Derived | None = None,
    ) -> None:
        self.model, self.config, self.digest, self._derived = model, config, digest, derived
        self.known = tuple(known)
        self.probes = tuple(probes) or _PROBES_OF_0_1_0
        """Inputs to try an adapter on: three of the run's own, or lists of digits for a bundle of
        version 0.1.0, which has none."""
        self._measured_following: PromptFollowing | None = None
        self._asked_following = False
        self._logged_lines = set[str]()
        self._indexed: dict[tuple[tuple[str, ...], bool], Bank] = {}
        self._calibration = derived.calibration() if derived else None
        self._reader: LoraReader | None = None
        self._threshold: Threshold | None = None

    @classmethod
    def from_run(
        cls,
        path: str | Path,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str | None = None,
        base: str | None = None,
    ) -> "Ship":
        """Open a run.

        Args:
            path: The run's folder, or that of its bundle.
            device: Where its models are to be: "auto" (the GPU, where torch sees one), "cpu",
                "cuda", "cuda:1".
            dtype: In which numbers they compute: "bfloat16" or "float32"; None: bfloat16 on a GPU
                that computes in it, else float32. Latents, losses and KL stay in float32.
            base: Folder of the base model now, if it is not where the run's config says.

        Returns:
            The run, ready to answer.

        Raises:
            UserError: There is no bundle or it is damaged; a frozen model has changed since;
                prompts would not be rendered as in training; or there is no such device.
        """
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        bundle = Bundle.open(path, base)
        check_bases(bundle.folder, frozen_bases(bundle.config), bundle.bases)
        # The attention it was trained with may not run here; what it computes is the same.
        weights = LoadedWeights(dtype, "auto", device)
        model = build_ship(bundle.config.model, weights, bundle.config.loss)
        bundle.check_prompt_format(vars(model.collator.prompts))
        bundle.load_into(model)
        _cast_trained(model, dtype)
        known, probes = bundle.known_instructions, bundle.probes
        derived = Derived(bundle.folder, bundle.digest, str(dtype).removeprefix("torch."))
        model = model.to(device).eval()
        unpack(model.roles, budget.bytes_to_unpack(device))
        return cls(model, bundle.config, bundle.digest, known, probes, derived)

    @cached_property
    def bank(self) -> Bank:
        """The known instructions with their latents, encoded when they are first needed and then
        kept with the bundle."""
        texts = tuple(dict.fromkeys(self.known))
        kept = self._derived.posteriors(texts) if self._derived else None
        if kept is not None:
            mean_CZ, log_variance_CZ = (tensor.to(self.model.device) for tensor in kept)
            return Bank(texts, mean_CZ, log_variance_CZ)
        bank = Bank.build(self.model, texts)
        if self._derived:
            self._derived.keep_posteriors(texts, bank.latent_CZ, bank.log_variance_CZ)
        return bank

    def bank_to_search(
        self,
        config: InductionConfig,
        log: Log = no_log,
        seen: Sequence[SplitTask] | None = None,
    ) -> Bank:
        """The known instructions as a search wants them: with their tasks' examples, by words,
        where it looks there (`InductionConfig.searches_by_examples`).

        Args:
            config: How it is searched.
            log: Takes a line where these examples are wanted and not at hand.
            seen: Tasks of training, which are the known ones then; None reads them where the run
                did, once, if they are still there, and what comes of them is kept with the bundle.
        """
        bank = self.bank if seen is None else self.bank_of([task.task.instruction for task in seen])
        if not config.searches_by_examples(bank.share_in_slots):
            return bank
        key = bank.instructions, seen is None
        if key not in self._indexed:
            index = self._example_index(log) if seen is None else ExampleIndex.of_tasks(seen)
            self._indexed[key] = bank if index is None else bank.with_index(index)
        return self._indexed[key]

    def _example_index(self, log: Log) -> ExampleIndex | None:
        """Of the known tasks; None where their examples are nowhere."""
        kept = self._derived.example_index(self.known) if self._derived else None
        if kept is not None:
            return kept
        try:
            seen = self._seen()
        except (UserError, OSError):
            log("the run's data are not where they were: no known task is found by its examples")
            return None
        if {task.task.instruction for task in seen} != set(self.known):
            log("the run's data are others now: no known task is found by its examples")
            return None
        index = ExampleIndex.of_tasks(seen)
        if self._derived:
            self._derived.keep_example_index(index)
        return index

    def bank_of(self, instructions: Sequence[str]) -> Bank:
        """These instructions with their latents: the run's own bank where they are its own."""
        texts = tuple(dict.fromkeys(instructions))
        is_own = texts == tuple(dict.fromkeys(self.known))
        return self.bank if is_own else Bank.build(self.model, texts)

    def calibrate(self, log: Log = no_log) -> Calibration | None:
        """From which agreement on answers were right on the run's dev tasks: measured once, nine
        answers an input, and then kept with the bundle.

        Args:
            log: Takes a line before it is measured.

        Returns:
            None where the data are not where they were.
        """
        if self._calibration is None:
            try:
                dev = source_of(self.config.data).read(self.model.prompts.tokenizer, no_log).dev
            except (UserError, OSError):
                log("the run's data are not where they were: what agreement is worth is not known")
                return None
            log("measuring once on the run's dev tasks from which agreement on answers are right")
            self._calibration = calibrate_confidence(self.model, dev, self._length)
            if self._derived:
                self._derived.keep_calibration(self._calibration)
        return self._calibration

    @cached_property
    def _surroundings(self) -> Surroundings:
        return Surroundings.of(self.bank)

    def searching(
        self,
        config: InductionConfig,
        log: Log = no_log,
        seen: Sequence[SplitTask] | None = None,
    ) -> InductionConfig:
        """The search as it suits this run. Where the Task LLM does not follow text in its prompt,
        candidates are ranked through the encoder alone, unless `ranks_in_prompt` was set; and it is
        not asked for a text, unless `asks_task_llm` was.

        Args:
            config: How to search.
            log: Takes a line about what was measured.
            seen: Tasks of training; None reads them where the run did, if they are still there.
        """
        off = [name for name in _OF_FOLLOWING if name not in config.model_fields_set]
        asks = config.suited_to(self._share_in_slots).asks_task_llm
        if not asks and "asks_task_llm" in off:
            off.remove("asks_task_llm")
        following = self._following(log, seen) if off else None
        if following is None or following.follows:
            return config
        line = f"{following}: {', and '.join(_OF_FOLLOWING[name] for name in off)}"
        if log is not no_log and line not in self._logged_lines:
            self._logged_lines.add(line)
            log(line)
        return config.model_copy(update=dict.fromkeys(off, False))

    @cached_property
    def _share_in_slots(self) -> float:
        """As of the bank, before it is encoded."""
        return share_in_slots(self.known) if self.known else 1.0

    def _following(self, log: Log, seen: Sequence[SplitTask] | None) -> PromptFollowing | None:
        """What was measured of text in the prompt, once; None where there is nothing to measure it
        on."""
        if not self._asked_following:
            self._measured_following = self._derived.following() if self._derived else None
            if self._measured_following is None:
                self._measured_following = self._measure_following(log, seen)
            # Behind it: who is interrupted has measured nothing.
            self._asked_following = True
        return self._measured_following

    def _measure_following(
        self, log: Log, seen: Sequence[SplitTask] | None
    ) -> PromptFollowing | None:
        try:
            following = measure_prompt_following(self.model, self._seen() if seen is None else seen)
        except (UserError, OSError):
            log(
                "the run's data are not where they were: whether the Task LLM follows text in its "
                "prompt is not measured, and the search goes on as if it did"
            )
            return None
        if following is not None and self._derived:
            self._derived.keep_following(following)
        return following

    def _seen(self) -> Sequence[SplitTask]:
        return source_of(self.config.data).read(self.model.prompts.tokenizer, no_log).seen

    @property
    def dtype(self) -> torch.dtype:
        """In which numbers the models compute."""
        return next(self.model.encoder.head.parameters()).dtype

    @property
    def _length(self) -> int:
        return self.config.evaluation.max_new_tokens

    @torch.no_grad()
    def deduce(self, instruction: str) -> Deduction:
        """The adapter that the hypernetwork makes of an instruction.

        Args:
            instruction: What to do with an input.

        Returns:
            Latent and adapter, and how far the instruction is from those of training.
        """
        checks.check_instruction(self.model, instruction)
        latent_TZ = self.model.encode([instruction])
        adapter = self.model.adapt(latent_TZ, [instruction])
        familiarity = self.familiarity(instruction)
        return Deduction(instruction, tuple(latent_TZ[0].tolist()), adapter, familiarity)

    @torch.no_grad()
    def read(
        self,
        examples: Sequence[Pair] = (),
        instruction: str | None = None,
        inputs: Sequence[str] = (),
    ) -> Deduction:
        """The adapter that the encoder makes of examples, or of inputs without answers, in one
        pass, without a search.

        Args:
            examples: Pairs of input and target, none of which is to be answered afterwards.
            instruction: What they follow, where it is known.
            inputs: In place of examples: what is to be answered, or others like it.

        Returns:
            Latent and adapter. Its instruction is the given one, or what the decoder reads out of
            the latent; the familiarity is that of a given one.

        Raises:
            UserError: This run's encoder reads no examples, or fewer than these, or always read
                their targets; or both are given.
        """
        if examples and inputs:
            raise UserError("give examples, or inputs without their targets: not both")
        texts = checks.listed(inputs, "inputs")
        given = [Example(text, "") for text in texts] if texts else checks.paired(examples)
        reading = Reading(instruction, tuple(given), states_targets=not texts)
        checks.check_reading(self.model, reading)
        latent_TZ = self.model.encode([reading])
        adapter = self.model.adapt(latent_TZ, [reading])
        latent = tuple(latent_TZ[0].tolist())
        if instruction is not None:
            return Deduction(instruction, latent, adapter, self.familiarity(instruction), reading)
        length = self.config.evaluation.max_instruction_tokens
        text = self.model.decode(latent_TZ, length)[0]
        return Deduction(text, latent, adapter, None, reading)

    @torch.no_grad()
    def familiarity(self, instruction: str) -> Familiarity | None:
        """How an instruction lies among those that were trained on.

        The first call encodes all of these, which takes a while for a large model; they are then
        kept with the bundle.

        Args:
            instruction: What to do with an input.

        Returns:
            Its isolation; None where the bundle knows fewer than two instructions.

        Raises:
            UserError: The encoder cannot read the instruction.
        """
        return next(iter(self.familiarities([instruction])), None)

    @torch.no_grad()
    def familiarities(self, instructions: Sequence[str]) -> list[Familiarity]:
        """`familiarity` of many, which are encoded together.

        Args:
            instructions: What to do with an input, each.

        Returns:
            One of each, in their order; none at all where the bundle knows fewer than two.

        Raises:
            UserError: The encoder cannot read one of them.
        """
        for instruction in instructions:
            checks.check_instruction(self.model, instruction)
        if len(self.known) < 2:
            return []
        return self._surroundings.familiarities(self.model, self.bank, instructions)

    @torch.no_grad()
    def confidence(self, instruction: str, inputs: Sequence[str] = ()) -> Confidence:
        """How far the answers to an instruction can be relied on, without labels: how many samples
        of its posterior answer as its mean does.

        Args:
            instruction: What to do with each input.
            inputs: The inputs; none: the run's probes.

        Returns:
            The agreement of each input, beside what it says of the run's dev tasks where that was
            measured (`calibrate`). As many answers as eight adapters give are made for it.
        """
        texts = checks.listed(inputs, "inputs") or list(self.probes)
        checks.check_instruction(self.model, instruction)
        checks.check_inputs(self.model, texts, self._length, instruction)
        posterior = self.model.posterior([instruction])
        wordings, asked, length = [instruction], [texts], self._length
        read = self.model.read_where_fused(wordings)
        answers = answer_latents(
            self.model, posterior.mean_TZ, wordings, asked, length, readings=read
        )
        agreed = agreement(self.model, posterior, wordings, asked, answers, length, readings=read)
        return Confidence(tuple(agreed[0]), self._calibration)

    def answer(
        self, instruction: str, inputs: Sequence[str], num_beams: int = 1
    ) -> list[str | None]:
        """Answers under the instruction's adapter, without the instruction in the prompt.

        Args:
            instruction: What to do with each input.
            inputs: The inputs.
            num_beams: 1 decodes greedily.

        Returns:
            An answer to each input; None where it did not end within the configured length.
        """
        return self.answer_many([instruction], [inputs], num_beams)[0]

    def answer_many(
        self, instructions: Sequence[str], inputs: Sequence[Sequence[str]], num_beams: int = 1
    ) -> list[list[str | None]]:
        """As `answer`, for several instructions whose inputs share batches.

        Args:
            instructions: One of each task.
            inputs: Those of each task.
            num_beams: 1 decodes greedily.

        Returns:
            The answers of each task.
        """
        asked = [checks.listed(texts, "inputs") for texts in inputs]
        for instruction, texts in zip(instructions, asked, strict=True):
            checks.check_instruction(self.model, instruction)
            checks.check_inputs(self.model, texts, self._length, instruction)
        return answer_read(self.model, instructions, instructions, asked, self._length, num_beams)

    @torch.no_grad()
    def answer_bare(self, inputs: Sequence[str]) -> list[str | None]:
        """What the Task LLM answers without any adapter; None where an answer does not end."""
        return answer_bare(self.model, [checks.listed(inputs, "inputs")], self._length)[0]

    def induce(
        self,
        examples: Sequence[Pair],
        config: InductionConfig | None = None,
        seed: int = 0,
        log: Log = no_log,
    ) -> Induction:
        """The instruction that explains examples.

        Args:
            examples: Pairs of input and target; one is enough to start.
            config: How to search; None for the defaults.
            seed: Of the texts that are sampled.
            log: Takes a line of progress.

        Returns:
            The best instruction, all candidates best first (`Candidate.rank`), and the latent that
            explains most examples.
        """
        tasks = [self._examples(examples)]
        search = self.searching(self._induction(config), log)
        bank = self.bank_to_search(search, log)
        return induce_many(self.model, bank, tasks, search, seed, log)[0]

    def explain(
        self,
        folder: str | Path,
        inputs: Sequence[str] = (),
        *,
        merged: bool = False,
        config: InductionConfig | None = None,
        seed: int = 0,
        log: Log = no_log,
    ) -> Explanation:
        """What an adapter does, of ours or trained by somebody else, in words.

        The first call of a run trains a reader of its adapters and measures on its dev tasks from
        which agreement on a text counts; both take minutes, once, and are kept with the bundle.

        Args:
            folder: A PEFT folder for the run's base model, of the kind that the run makes.
            inputs: What the adapter is asked; none: inputs of the run's own tasks, or made of its
                probes' words where its data are not where they were.
            merged: The folder is a model that an adapter was merged into.
            config: How to search; None for the defaults.
            seed: Of every draw.
            log: Takes lines of progress.

        Returns:
            The instruction, or None where nothing that can be said does this; and the candidates by
            how many of the adapter's answers each gives.

        Raises:
            UserError: Also where the folder cannot be read, or is of another base model; the line
                names the module or setting.
        """
        texts = list(dict.fromkeys(checks.listed(inputs, "inputs")))
        checks.check_inputs(self.model, texts, self._length)
        reads = read_merged if merged else read_adapter
        adapter = reads(self.model, Path(folder))
        if not self.is_ready_to_explain:
            log(
                "the first explanation of a run: a reader of its adapters and a threshold are made "
                "before it, once and in minutes"
            )
        settings = self.searching(self._induction(config), log)
        return explain_many(
            self.model,
            self.bank,
            [adapter],
            [texts or self.inputs_to_try()],
            settings,
            self._length,
            self.explaining_threshold(log).value,
            self.lora_reader(log),
            seed,
            log,
        )[0]

    def inputs_to_try(self) -> list[str]:
        """Inputs to ask an adapter that nothing is known of: those of the run's own seen tasks, one
        a task; or, where the data are not where they were, the probes and others of their words."""
        try:
            tasks = self._seen()
        except (UserError, OSError):
            tasks = ()
        return made_up(tasks, self.probes)

    def lora_reader(self, log: Log = no_log) -> LoraReader | None:
        """The network that reads this run's adapters; trained when it is first asked for, in a
        minute or a few, and then kept with the bundle.

        Args:
            log: Takes a line before it is trained.

        Returns:
            None for a run whose adapters are no LoRAs.
        """
        self._take_what_is_kept()
        if self._reader is None and can_read(self.model):
            log("training once a reader of this run's adapters")
            self._reader = train_reader(self.model, self.bank, log)
            if self._derived:
                self._derived.keep_reader(self._reader)
        return self._reader

    @property
    def is_ready_to_explain(self) -> bool:
        """Whether what `explain` has to train and to measure first is there."""
        self._take_what_is_kept()
        has_reader = self._reader is not None or not can_read(self.model)
        return has_reader and self._threshold is not None

    def _take_what_is_kept(self) -> None:
        """Reader and threshold, where an earlier process left them with the bundle."""
        if self._derived is None:
            return
        if self._reader is None and can_read(self.model):
            sites, size = self.model.task_llm.sites(), self.config.model.latent_size
            self._reader = self._derived.reader(sites, size)
        if self._threshold is None:
            self._threshold = self._derived.threshold()

    def prepare_to_explain(self, log: Log = no_log) -> None:
        """Train and measure now what the first call of `explain` otherwise would.

        Args:
            log: Takes lines of progress.
        """
        self.lora_reader(log)
        self.explaining_threshold(log)

    def explaining_threshold(self, log: Log = no_log) -> Threshold:
        """From which agreement on a text counts as saying what an adapter does: measured once on
        adapters that are made of the run's dev tasks, and then kept with the bundle.

        Args:
            log: Takes a line before it is measured.

        Returns:
            One half, of no tasks, where the data are not where they were.
        """
        self._take_what_is_kept()
        if self._threshold is None:
            try:
                dev = source_of(self.config.data).read(self.model.prompts.tokenizer, no_log).dev
            except (UserError, OSError):
                log("the run's data are not where they were: the threshold is one half")
                self._threshold = Threshold(HALF, 0.0, 0.0, 0)
                return self._threshold
            log("measuring once on the run's dev tasks from which agreement on a text counts")
            self._threshold = calibrate_explaining(
                self.model,
                self.bank,
                dev,
                self.inputs_to_try(),
                self.searching(self._induction(None), log),
                self._length,
                self.lora_reader(log),
                log,
            )
            if self._derived:
                self._derived.keep_threshold(self._threshold)
        return self._threshold

    def reason(
        self,
        examples: Sequence[Pair],
        inputs: Sequence[str],
        config: InductionConfig | None = None,
        num_rounds: int = 1,
        seed: int = 0,
        log: Log = no_log,
    ) -> Reasoning:
        """Inductive reasoning: induce an instruction from examples, encode it again, answer.

        Args:
            examples: Pairs of input and target.
            inputs: To be answered as the examples are.
            config: How to search; None for the defaults.
            num_rounds: How often text and latent take turns.
            seed: Of the texts that are sampled.
            log: Takes a line of progress.

        Returns:
            The induction, and the answers by the latent that it found, by the text encoded again
            (with the examples where the encoder reads both), with the text in the prompt and, where
            the encoder was trained to, by the examples alone.
        """
        tasks, asked = [self._examples(examples)], [checks.listed(inputs, "inputs")]
        checks.check_inputs(self.model, asked[0], self._length)
        settings = self.searching(self._induction(config), log)
        bank = self.bank_to_search(settings, log)
        return reason_many(
            self.model, bank, tasks, asked, settings, self._length, num_rounds, seed, log
        )[0]

    def encode(self, instruction: str) -> tuple[float, ...]:
        """The mean of an instruction's posterior, Z numbers."""
        checks.check_instruction(self.model, instruction)
        return tuple(self.model.encode([instruction])[0].tolist())

    def decode(self, latent: Sequence[float]) -> str:
        """The instruction that the decoder reads out of a latent alone.

        Args:
            latent: Z numbers.

        Raises:
            UserError: They are more or fewer than this run's latent has.
        """
        if len(latent) != self.config.model.latent_size:
            raise UserError(
                f"latent: has {len(latent)} numbers and this run's has "
                f"{self.config.model.latent_size}"
            )
        latent_TZ = torch.tensor([latent], device=self.model.device)
        return self.model.decode(latent_TZ, self._induction(None).max_new_tokens)[0]

    def nearest_known(self, latent: Sequence[float], count: int = 5) -> list[Neighbour]:
        """The known instructions whose latents are nearest, nearest first.

        Args:
            latent: Z numbers.
            count: How many, at most.
        """
        return nearest_known(self.bank, torch.tensor(latent, device=self.model.device), count)

    def _induction(self, config: InductionConfig | None) -> InductionConfig:
        return config or InductionConfig(
            max_new_tokens=self.config.evaluation.max_instruction_tokens
        )

    def _examples(self, pairs: Sequence[Pair]) -> list[Example]:
        examples = checks.paired(pairs)
        checks.check_examples(self.model, examples)
        return examples


def _cast_trained(model: ShipModel, dtype: torch.dtype) -> None:
    """Bring the trained parameters to a type, as the engine does in training; the frozen ones were
    loaded in it. `Module.to` would also round buffers, such as the frequencies of rotary
    positions."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
