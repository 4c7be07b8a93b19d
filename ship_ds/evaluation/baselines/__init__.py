"""The baselines that are trained: each a small class behind the signature of method.py, on the
run's base, split and budget."""

from ship_ds.evaluation.baselines.itd import Itd
from ship_ds.evaluation.baselines.lora_per_task import LoraPerTask
from ship_ds.evaluation.baselines.prompt_tuning import PromptTuning
from ship_ds.evaluation.baselines.sft import Sft
from ship_ds.evaluation.baselines.tagi import Tagi
from ship_ds.evaluation.baselines.text_to_lora import TextToLora
from ship_ds.evaluation.baselines.trained import TrainedMethod

__all__ = [
    "TRAINED",
    "Itd",
    "LoraPerTask",
    "PromptTuning",
    "Sft",
    "Tagi",
    "TextToLora",
    "TrainedMethod",
]

TRAINED: tuple[type[TrainedMethod], ...] = (Sft, PromptTuning, Tagi, TextToLora, Itd)
