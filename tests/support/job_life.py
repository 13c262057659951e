"""`python -m tests.support.job_life DIR`: a platform with jobs alone, which starts all that wait; made to be killed."""

import asyncio
import sys
from pathlib import Path

from tests.support.jobs import Jobs


async def main() -> None:
    jobs = await Jobs(Path(sys.argv[1])).open()
    print("open", flush=True)
    while True:
        for view in jobs.controller.views():
            if view.phase == "queued":
                jobs.controller.start(view.id, jobs.devices[: view.devices], "for a test")
        await asyncio.sleep(0.02)


asyncio.run(main())
