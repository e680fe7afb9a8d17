"""Steps that tests hand to executors; here because workers import them by name."""

from __future__ import annotations

import logging
import os
import signal
import time

import torch

from qll.errors import NonFiniteError


def norm_of(source, moments, options, name, folder):
    """A step: the norm of a tensor; leaves a file that says which process took which tensor."""
    (folder / f"{name}.{os.getpid()}").touch()
    return name, float(source.read(name).double().norm()), torch.get_num_threads()


def dies_once(source, moments, options, name, folder):
    """A step that is killed the first time it runs on the first tensor."""
    mark = folder / "died"
    if name.endswith("q_proj.weight") and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return norm_of(source, moments, options, name, folder)


def always_dies(source, moments, options, name, folder):
    """A step that no worker survives."""
    (folder / f"try.{os.getpid()}").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def complains(source, moments, options, name):
    """A step that finds a weight it cannot use."""
    raise NonFiniteError("weights hold NaN", where=name)


def warns(source, moments, options, name):
    """A step that has something to say."""
    logging.getLogger("qll.tests").warning("%s is singular", name)
    return name


def slow(source, moments, options, seconds, folder):
    """A step that takes its time; leaves a file when it begins."""
    (folder / f"begun.{os.getpid()}").touch()
    time.sleep(seconds)
    return seconds
