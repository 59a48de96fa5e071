"""Jobs with the same prompt: one processes it, the others wait for its cache. Pure bookkeeping, main thread only."""

import msgspec

from worker.jobs import Job


class _Group(msgspec.Struct):
    """Jobs of one group. `leader` processes the prompt now, `waiting` want the result, `members` have it."""

    number: int
    prompt: list[int]
    leader: int | None = None
    waiting: dict[int, Job] = {}
    members: set[int] = set()


class Groups:
    """The groups that have living jobs. Jobs without a group, or with nothing to share, are never in one."""

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}
        self._of_job: dict[int, _Group] = {}

    def wait(self, job: Job) -> bool:
        """Let the job wait if its prompt is being processed for another; return whether it is."""
        group = self._find(job)
        if group is None or group.leader is None:
            return False
        group.waiting[job.id] = job
        self._of_job[job.id] = group
        return True

    def shares(self, job: Job) -> bool:
        """Return whether another processes the job's prompt, or has done so: it costs nothing to begin with it."""
        return self._find(job) is not None

    def living(self, job: Job) -> list[int]:
        """Return jobs whose caches begin with this job's prompt."""
        group = self._find(job)
        return [] if group is None else list(group.members)

    def lead(self, job: Job) -> bool:
        """Note that this job processes the prompt of its group; return whether it is in one."""
        if not job.group or len(job.prompt) < 2:
            return False
        group = self._find(job)
        if group is None:
            if job.group in self._groups:  # the same number and another prompt: not a group
                return False
            group = self._groups[job.group] = _Group(job.group, job.prompt)
        group.leader = job.id
        self._of_job[job.id] = group
        return True

    def follow(self, job: Job) -> None:
        """Note that this job goes on with the cache of a living one."""
        group = self._groups[job.group]
        group.members.add(job.id)
        self._of_job[job.id] = group

    def release(self, leader: int) -> list[Job]:
        """Note that a leader's prompt is processed; return those who waited for it."""
        group = self._of_job.get(leader)
        if group is None or group.leader != leader:
            return []
        waiting = list(group.waiting.values())
        group.leader = None
        group.waiting = {}
        group.members.add(leader)
        group.members.update(job.id for job in waiting)
        return waiting

    def leave(self, job: int) -> Job | None:
        """Forget a job; return the one that has to process the prompt in its place, now the leader."""
        group = self._of_job.pop(job, None)
        if group is None:
            return None
        group.waiting.pop(job, None)
        group.members.discard(job)
        successor = None
        if group.leader == job:
            successor = next(iter(group.waiting.values()), None)
            group.leader = None
            if successor is not None:
                group.leader = successor.id
                del group.waiting[successor.id]
        if group.leader is None and not group.members:
            del self._groups[group.number]
        return successor

    def _find(self, job: Job) -> _Group | None:
        group = self._groups.get(job.group)
        # Compared: the number is made by others, and a cache of another prompt would be another answer.
        return group if group is not None and group.prompt == job.prompt else None
