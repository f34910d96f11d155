"""From files to batches: sources of images, transforms, loaders."""
