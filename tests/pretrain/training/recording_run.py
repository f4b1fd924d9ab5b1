"""Train a run whose rank 0 writes the records of each step to NAME.records: `recording_run.py CONFIG`."""

import json

import pretrain.training.setup
from pretrain.training.loop import Trainer
from pretrain.training.main import main


class RecordingTrainer(Trainer):
    def _count(self, rows):
        super()._count(rows)
        if self.world.is_main:
            with open(self.config.run_dir.parent / f"{self.config.name}.records", "a") as file:
                file.write(json.dumps({"step": self.progress.step, "records": sorted(rows.records.tolist())}) + "\n")


pretrain.training.setup.Trainer = RecordingTrainer
main()
