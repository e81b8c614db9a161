"""Runs cases of a fuzzer one by one: their outcome, their time, and the memory of all of them."""

import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path


# `LLAVA_WHOLE=1`, as in `make fuzz`, asks for all cases. Otherwise every tenth of them runs.
STRIDE = 1 if os.environ.get("LLAVA_WHOLE") == "1" else 10

MAX_SECONDS = 2.0
# A process that has imported torch and this package holds 0.4 GB, which leaves this much of 1.5 GB.
MAX_MEGABYTES = 1100


class TookTooLong(BaseException):
    """No error that code under test may catch."""


def _stop(*_):
    raise TookTooLong


def _status(name):
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1000


def run_cases(name, piece, pieces, cases, run_case, is_known=lambda error: False):
    """Runs every `STRIDE`th of a piece's share of `cases`: `run_case(rng)` may raise `ValueError`s and `OSError`s.

    Args:
        name (`str`): Seeds the cases, with their number.
        piece, pieces, cases (`int`): Piece `piece` of `pieces` has `cases / pieces` of them.
        run_case (`Callable`): Returns an outcome's name.
        is_known (`Callable`, *optional*): Whether another error is a known one of another package.
    """
    outcomes, times, wrong = Counter(), [], []
    Path("/proc/self/clear_refs").write_text("5")  # makes the peak what is held now
    before = _status("VmRSS")
    signal.signal(signal.SIGVTALRM, _stop)
    for case in range(piece, cases, pieces * STRIDE):
        signal.setitimer(signal.ITIMER_VIRTUAL, 5 * MAX_SECONDS)
        start = time.process_time()  # which other processes on the machine do not change
        try:
            outcome = run_case(random.Random(f"{name} {case}"))
        except (ValueError, OSError) as error:
            outcome = "ValueError" if isinstance(error, ValueError) else "OSError"
        except TookTooLong:
            outcome = "stopped"
        except Exception as error:
            outcome = f"{type(error).__name__} (known)" if is_known(error) else type(error).__name__
            if not is_known(error):
                wrong.append(f"{name} {case}: {type(error).__name__}: {str(error)[:200]}")
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        times.append((time.process_time() - start, case))
        outcomes[outcome] += 1
    grown = _status("VmHWM") - before
    seconds, slowest = max(times)
    print(
        f"\n{name}, piece {piece} of {pieces}: {len(times)} cases, {dict(outcomes.most_common())}, "
        f"at most {seconds:.2f} s (case {slowest}), {grown:.0f} MB more"
    )
    assert not wrong, "\n".join(wrong)
    assert seconds < MAX_SECONDS, f"{name} {slowest} takes {seconds:.2f} s."
    assert grown < MAX_MEGABYTES, f"The cases take {grown:.0f} MB."
    return outcomes
