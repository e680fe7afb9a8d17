"""The byte-level quantum-inspired language model and its real-valued twin: bytes in, bytes out.

Read `config` for what a model can be made of, `model` for how it is put together, `runfiles` for
what training leaves behind. Settings and paths come without torch.
"""
