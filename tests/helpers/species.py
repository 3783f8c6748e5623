"""Directory names of iNaturalist, at least one for each of its superclasses."""

SPECIES = [
    "00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris",
    "00001_Animalia_Arthropoda_Arachnida_Araneae_Araneidae_Araneus_diadematus",
    "00002_Animalia_Arthropoda_Insecta_Coleoptera_Coccinellidae_Adalia_bipunctata",
    "00003_Animalia_Chordata_Actinopterygii_Esociformes_Esocidae_Esox_lucius",
    "00004_Animalia_Chordata_Amphibia_Anura_Bufonidae_Bufo_bufo",
    "00005_Animalia_Chordata_Aves_Passeriformes_Corvidae_Corvus_corax",
    "00006_Animalia_Chordata_Mammalia_Carnivora_Canidae_Vulpes_lagopus",
    "00007_Animalia_Chordata_Mammalia_Carnivora_Canidae_Vulpes_vulpes",
    "00008_Animalia_Chordata_Reptilia_Squamata_Lacertidae_Zootoca_vivipara",
    "00009_Animalia_Mollusca_Gastropoda_Stylommatophora_Helicidae_Helix_pomatia",
    "00010_Fungi_Basidiomycota_Agaricomycetes_Agaricales_Amanitaceae_Amanita_muscaria",
    "00011_Plantae_Tracheophyta_Magnoliopsida_Asterales_Asteraceae_Bellis_perennis",
]
