"""Flags of the older suites and of older versions that a script may not have, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping

OLD_FLAGS: Mapping[str, str] = {
    # of SpursLipu, tanluren, coldlarry, chumingqian, Lam1360 and ultralytics/yolov3
    "nms_thres": "it is --iou-thres",
    "transfer": "--freeze N leaves blocks 0…N-1 as they are",
    **dict.fromkeys(("mixedprecision", "mpt"), "it is --amp"),
    **dict.fromkeys(("ddp", "rank", "local_rank"), "torchrun --nproc_per_node=N train.py … trains with N processes"),
    **dict.fromkeys(
        ("accumulate", "nbs", "nominal_batch"),
        "batches are accumulated up to 64 images; a larger --batch-size is a larger step",
    ),
    "gray_scale": "a cfg with [net] channels=1 reads grey images",
    "arc": "the loss is that of YOLOv3; --hyp weights its terms",
    "prebias": "biases of the heads start where few objects are expected",
    "img_weights": "name images of rare classes several times in the list of train images",
    **dict.fromkeys(("maxabsscaler", "mas"), "images are scaled to 0…1, always"),
    "percent": "layer_prune.py removes residual units, --shortcuts N of them",
    "truncated_layer": "the groups of a network are found in its cfg",
    "delta": "--target-macs finds the amount",
    "number": "--target-macs finds the amount without trials",
    "channel_base": "it is --multiple-of",
    "subset_len": "it is --calib",
    "shortcut_way": "--target says how sums are rounded",
    "qlevel": "--target says whether layers or channels have a scale",
    "qlayers": "--quant-first and --quant-heads say what stays float",
    **dict.fromkeys(
        ("quantized", "fpga", "bn_fold", "bn_flod", "a_bit", "w_bit"), "the file of --weights says how it is quantized"
    ),
    **dict.fromkeys(
        ("quantizer_output", "layer_idx", "reorder", "tn", "tm"),
        "export.py --format fpga writes the integers of all layers",
    ),
    # of this suite
    "bucket": "nothing is uploaded. Copy the run directory when the training is over",
    "memory_format": "tensors are channels-last, always",
    "s_coach": "--s auto measures AP50 after every epoch itself",
    "s_enough": "--s auto stops pressing on channels once --s-share of them are weak",
    "s_turn": "--s-schedule dynamic turns after 0.4 of the epochs, global after half of them",
    "s_keep": "--s-schedule dynamic keeps 0.65 of the channels under pressure",
    "s_solver": "soft thresholding goes with --s auto and with --adam, a sub-gradient with all else",
    "all_convs": "channels outside the classic ones need no sparse training; prune with --importance taylor",
    "kd_temperature": "it is 3, always",
    "kd_weighting": "the weights are those that measured best, see docs/distillation.md",
    "kd_mask": "--KDstr 5 looks at features near objects only",
    "dorefa_grid": "--quantized 2 rounds to levels with a 0, which can be exported",
    **dict.fromkeys(("ema", "no_ema"), "averaged weights are evaluated and kept, always"),
    "save_period": "last.pt and prev.pt are the last two epochs; copy what is to be kept",
    "evaluator": "AP equals pycocotools' to the last digit; pycocotools reads what test.py --save-json writes",
    "strict_data": "python -m utils.data.doctor lists what is wrong with a data set, and ends with status 2",
    "cache_dir": "the folder is that of $XDG_CACHE_HOME, or ~/.cache",
    "equalize": "it often did harm where each channel has a scale of its own; --bias-correction and --max-drop help",
    "sensitivity": "compare amounts with --dry-run; quantize.py --keep-float and --max-drop measure convolutions",
    "sensitivity_pictures": "--max-drop measures AP50 on all valid images of --data",
}
"""Names in lower case, without dashes and with underscores."""
