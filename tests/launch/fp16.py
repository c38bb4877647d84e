"""float16 with a gradient scaler on CPUs."""

import torch


class FP16OnCPU:
    """
    Goes before a trainer class: makes accelerate train in float16 with a gradient scaler.

    On CPUs accelerate takes `fp16=True` and does nothing. Torch has both for CPUs; told to, accelerate takes the path
    of a GPU run.
    """

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
