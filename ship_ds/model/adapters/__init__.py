"""Adapters: what z becomes and the Task LLM applies.

    adapter.py        the port: an adapter's value, the hypernetwork that makes it, its export
    lora.py           one file a kind: value, hypernetwork, export
    soft_prompt.py
    sites.py          where an adapter acts: the Task LLM's linears and blocks, wrapped once
    segment_lora.py   the products of a LoRA over task-major tokens

`kinds.ADAPTERS` finds the hypernetwork of a kind by its config class.
"""
