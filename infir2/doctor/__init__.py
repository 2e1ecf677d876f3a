"""`infir2 doctor`: what this machine computes with, whether it is right, and what to install."""
