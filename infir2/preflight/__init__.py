"""What can be known to be wrong before a run starts: `infir2 check`. Nothing is trained."""
