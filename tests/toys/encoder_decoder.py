"""A toy of the language model port, from outside the package: mT5, a T5 under another name.

    SHIP_DS_PLUGINS=tests.toys.encoder_decoder ship-ds train ... model.task_llm.base=<an mT5>

An architecture of another make is a class of its own, as `ship_ds/model/encoder_decoder.py` is.
"""

from transformers import MT5Config

from ship_ds.base_files import ENCODER_DECODERS, linears_of_t5
from ship_ds.model.encoder_decoder import EncoderDecoder
from ship_ds.model.language_model import LANGUAGE_MODELS

LANGUAGE_MODELS[MT5Config] = EncoderDecoder
ENCODER_DECODERS["mt5"] = linears_of_t5
