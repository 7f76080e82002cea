"""Using a promptable model: prompts in, masks out; and masks of everything in a picture."""
