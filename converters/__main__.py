"""`python -m converters`: the command of launch/convert.py."""

from __future__ import annotations

from launch.convert import main

if __name__ == "__main__":
    main()
