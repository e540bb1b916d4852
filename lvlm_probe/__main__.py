"""The command line as ``python -m lvlm_probe``."""

from lvlm_probe.cli import main

if __name__ == "__main__":
    main()
