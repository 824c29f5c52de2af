"""What only made the bundled model `nano`, or only answers a research question: not in the wheel, still tested."""
