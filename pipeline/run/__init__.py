"""What a long job needs: ranks, signals, checkpoints, curves, memory."""
