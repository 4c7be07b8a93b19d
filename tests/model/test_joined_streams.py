"""Streams that become one: every row goes on as it would have alone."""

from collections.abc import Sequence

import pytest
import torch

from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.adapters.sites import sites_of, wrap_sites
from ship_ds.model.batch import TokenBatch
from ship_ds.model.key_value_cache import ending_at, preallocated_layers
from ship_ds.model.language_model import Stream
from tests.model.models import FAMILIES, random_lora, random_rows, stream_of, tiny_lm
