"""What a process of warm.py finds in memory: imported by its server, once, before it forks."""

import gc

import bitsandbytes  # noqa: F401
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  DeepSpeed imports it at each start
import matplotlib.pyplot  # noqa: F401
import sklearn.feature_extraction.text  # noqa: F401

import ship_ds.cli
import ship_ds.train  # noqa: F401
from ship_ds.data.rules import part_rules
from tests import warm  # noqa: F401

part_rules(0)  # a second, which every run of a smoke recipe would take
gc.freeze()  # no collection in a fork goes through all of this, and copies its pages
