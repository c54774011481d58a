"""open_clip's training script with mulki's losses: same options, one line replaced.

    python examples/open_clip_training.py --model ViT-B-32 --train-data pairs.csv --batch-size 256
    torchrun --nproc-per-node 4 examples/open_clip_training.py --model ViT-B-16-SigLIP --siglip ...

For open_clip 3.x, with its extra: pip install "open_clip_torch[training]". Its main branch takes
the loss where it makes the task: CLIPTask(model, loss=ClipLoss()), and likewise SigLIPTask and
DistillCLIPTask.
"""

import sys

import open_clip
import open_clip_train.main

from mulki.losses import ClipLoss, DistillClipLoss, SigLipLoss


def create_loss(args):
    if args.distill:
        return DistillClipLoss()
    if args.siglip:
        return SigLipLoss()
    if "coca" in args.model.lower():  # its captioning loss has no counterpart here
        return open_clip.create_loss(args)
    return ClipLoss()


open_clip_train.main.create_loss = create_loss  # the line

if __name__ == "__main__":
    sys.exit(open_clip_train.main.main(sys.argv[1:]))
