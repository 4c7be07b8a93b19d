"""Encoder, posterior, hypernetwork, adapters, Task LLM and decoder, and their composition."""
