"""A plugin: language models read padded rows, as those of 0.1.0 did. Dropout draws a number for
every token that a linear sees, so its masks are 0.1.0's on those alone."""

from ship_ds.model import attention

attention.PACKS.clear()
