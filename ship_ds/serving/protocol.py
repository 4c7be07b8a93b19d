"""What clients may ask and what they get: OpenAI's types, every number and text of them bounded.

A field that is none of these would, in a service that knows it, either change the answer or not.
Those that would are refused by their name (`UNSUPPORTED`); others are let be, and named in the log
once.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ship_ds.serving.errors import RequestError

MAX_LETTERS = 65_536
"""Of one text."""
MAX_NAME_LETTERS = 256
"""Of a name that is registered."""


def _no_nul(text: str) -> str:
    if "\x00" in text:
        raise ValueError("holds a NUL")
    return text


Text = Annotated[str, Field(max_length=MAX_LETTERS), AfterValidator(_no_nul)]
Model = Annotated[str, Field(min_length=1, max_length=MAX_LETTERS)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LETTERS)]

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
    "reasoning_effort": (None, "none"),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "ignore_eos": (None, False),
    "stop_token_ids": (None, []),
    "bad_words": (None, []),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "prompt_embeds": (None,),
    "use_beam_search": (None, False),
    "lora_path": (None,),
    # Of vLLM, SGLang, llama.cpp, TGI and others, besides.
    "add_generation_prompt": (None, True),
    "adapter_id": (None,),
    "allowed_token_ids": (None, []),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "dry_multiplier": (None, 0),
    "dynatemp_range": (None, 0),
    "ebnf": (None, ""),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "grammar": (None, ""),
    "guidance_scale": (None, 1),
    "guided_decoding": (None, {}),
    "include_stop_str_in_output": (None, False),
    "json_schema": (None, {}),
    "length_penalty": (None, 1),
    "logits_processors": (None, []),
    "lora": (None, []),
    "max_length": (None,),
    "max_new_tokens": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "mirostat": (None, 0),
    "mirostat_mode": (None, 0),
    "n_predict": (None, -1),
    "no_repeat_ngram_size": (None, 0),
    "no_stop_trim": (None, False),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0),
    "prompt_logprobs": (None,),
    "regex": (None, ""),
    "repeat_penalty": (None, 1),
    "return_tokens_as_token_ids": (None, False),
    "skip_special_tokens": (None, True),
    "smoothing_factor": (None, 0),
    "stop_regex": (None, "", []),
    "tfs": (None, 1),
    "tfs_z": (None, 1),
    "top_a": (None, 0),
    "top_n_sigma": (None, 0, -1),
    "truncate": (None,),
    "truncate_prompt_tokens": (None,),
    "typical": (None, 1),
    "typical_p": (None, 1),
    "vllm_xargs": (None, {}),
    "watermark": (None, False),
    "xtc_probability": (None, 0),
}
"""Fields that would change an answer, with the values of theirs that ask for nothing."""


class Asked(BaseModel):
    """A request. Fields that it does not know are in `model_extra`."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    def unknown(self) -> list[str]:
        """Names of the fields that are let be.

        Raises:
            RequestError: 400, one of them would change the answer.
        """
        extra = self.model_extra or {}
        for name, value in extra.items():
            if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
                raise RequestError(
                    400, f"{name}: is not supported here: leave it out", name, "unsupported"
                )
        return [name for name in extra if name not in UNSUPPORTED]


class ShipExample(BaseModel):
    """An input with its target."""

    model_config = ConfigDict(extra="forbid")

    input: Text
    target: Text


RequestExamples = Annotated[list[ShipExample], Field(min_length=1, max_length=64)]


class StreamOptions(BaseModel):
    """Of a stream."""

    include_usage: bool = False


class Writes(Asked):
    """What requests for answers have in common."""

    model: Model
    ship_examples: RequestExamples | None = Field(
        None, description="with model `ship`, or `ship:<instruction>` where the encoder reads both"
    )
    n: int | None = Field(None, ge=1, le=64)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(Writes):
    """`POST /v1/completions`."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=64)]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def named_prompts(self) -> list[tuple[str, str]]:
        """The inputs, each with what an error calls it."""
        if isinstance(self.prompt, str):
            return [("prompt", self.prompt)]
        return [(f"prompt {number}", text) for number, text in enumerate(self.prompt, start=1)]


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A turn of a chat."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]

    @property
    def text(self) -> str:
        """Its parts one after another."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(Writes):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class LoadRequest(Asked):
    """`POST /v1/load_lora_adapter`."""

    lora_name: Name
    instruction: Text | None = None
    examples: RequestExamples | None = None


class UnloadRequest(Asked):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: Name
