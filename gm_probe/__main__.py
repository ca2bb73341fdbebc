"""``python -m gm_probe`` is ``gmprobe``."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the current folder, which -m puts there: it is no place for code

from gm_probe.cli import main

if __name__ == "__main__":
    main()
