"""The `melayer` command, also as `python -m melayer`."""

import sys


def main() -> None:
    """Runs the command line; what goes wrong while it is fetched is said as what goes wrong in it."""
    try:
        from melayer.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("melayer: Stopped. Nothing was kept.\n")
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises
        sys.stderr.write(
            f"melayer: cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())}). Install it again: "
            "pip install --force-reinstall melayer\n"
        )
        sys.exit(70)
    run()


if __name__ == "__main__":
    main()
