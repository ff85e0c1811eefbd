"""How torch's threads wait for their next piece of work. They read it when torch is loaded, so this comes before."""

import os

SPINS = "20000"


def wait_briefly() -> None:
    """Unless the user has chosen: spin a little, then sleep.

    Spinning for long makes a run several times slower beside any other program; sleeping at once makes a token that is
    written half as long again, since it is hundreds of small products, and a thread takes a tenth of a millisecond to
    wake up, which is longer than most of them.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
