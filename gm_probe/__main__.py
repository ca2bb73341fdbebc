"""``python -m gm_probe`` is ``gmprobe``."""

from gm_probe.cli import main

if __name__ == "__main__":
    main()
