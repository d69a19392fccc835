"""An own sink: one line of a CSV file an epoch, in the run folder.

Run it, or name it: localgrad train --plugin own_sink --sink csv --sink tensorboard
"""

import csv

import localgrad


class CsvSink(localgrad.Sink):
    """Epoch, validation accuracy and learning rate.

    Args:
        folder: of the run.
    """

    def __init__(self, folder):
        self.path = folder / "accuracy.csv"

    def emit(self, event):
        """Take one event; what is of no interest is passed over."""
        match event:
            case localgrad.RunStarted(start_epoch=0):
                self.write("w", "epoch", "accuracy", "learning rate")
            case localgrad.EpochEnded():
                self.write("a", event.epoch, event.val_accuracy, event.learning_rate)
            case localgrad.RunEnded():
                print(f"written: {self.path}")

    def write(self, mode, *values):
        """Write a line."""
        with self.path.open(mode, newline="") as file:
            csv.writer(file).writerow(values)


localgrad.register_sink("csv", CsvSink)

if __name__ == "__main__":
    vit = {"name": "vit_tiny_patch16_224", "img_size": 8, "patch_size": 2}
    vit["options"] = {"embed_dim": 32, "depth": 4, "num_heads": 2}
    recipe = {"data.name": "digits", "data.limit": 256, "model": vit, "training.epochs": 2, "training.batch_size": 32}
    localgrad.train({**recipe, "local.modules": 2}, sinks=["csv"])
