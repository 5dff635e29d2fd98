"""What runs the stages, whatever they compute."""
