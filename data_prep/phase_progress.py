"""Progress of a phase of the preparation, in bytes and records."""

from data_prep.utils.progress import Progress


class PhaseProgress(Progress):
    """Progress of one phase: processed bytes and records of all processes."""

    LINE_SECONDS = 60.0

    def __init__(self, title: str, size: int):
        super().__init__(title, size, "B")
        self.records = 0

    def add(self, size: int, records: int) -> None:
        """Add a finished task: `size` bytes of input, and its number of records."""
        self.records += records
        self.update(size)

    @property
    def amount(self) -> str:
        """The finished fraction."""
        return f"{self.done / max(1, self.total):.0%}"

    def describe(self, seconds: float, work: float) -> str:
        """Return the speed and the time left."""
        seconds = max(1e-9, seconds)
        speed = f"{self.records / seconds:,.0f} records/s, {self.done / seconds / 1e6:,.1f} MB/s"
        return f"{speed}, {super().describe(seconds, work)}"
