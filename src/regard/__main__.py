"""The ``regard`` command, also ``python -m regard``."""


def main() -> None:
    """The command; an interrupt ends it without a traceback, also while it is still being loaded."""
    try:
        from regard.cli import app

        app()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None


if __name__ == "__main__":
    main()
