from pathlib import Path
def open_meta(folder: Path, config=None, path=None):
    raise NotImplementedError
