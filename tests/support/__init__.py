"""What several tests share: data sets, runs, stores, stand-ins, and programs for processes of their own."""
