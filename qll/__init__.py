"""Quantum Llama Lens."""
