"""Python runs this at the start of every process of a chaos test's worker: it does there what the test asks for."""

import os

if os.environ.get("LORAMILL_CHAOS"):
    from tests.chaos.hooks import install

    install(os.environ["LORAMILL_CHAOS"])
