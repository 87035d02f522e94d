import os

# Set before diffusers is imported: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
