"""Adapters: what z becomes and the Task LLM applies.

    adapter.py        the port: an adapter's value, the hypernetwork that makes it, its export
    lora.py           one file a kind: value, hypernetwork, export
    soft_prompt.py
    sites.py          where an adapter acts: the Task LLM's linears and blocks, wrapped once
    segment_lora.py   the low-rank part of a linear, over task-major tokens
    segments.py       products with a matrix a task

`kinds.ADAPTERS` finds the hypernetwork of a kind by its config class.
"""
