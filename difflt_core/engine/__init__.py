"""What runs the stages, whatever they compute: artifacts, the scheduler, the training loop."""
