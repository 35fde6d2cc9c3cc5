"""What images and VMs are, and what may be done with them, decided from what was read. No file here touches storage."""
