/* Huffman decoding of baseline JPEGs, for _jpeg.c, in the place of libjpeg's own `decode_mcu`.
 *
 * It reads eight bytes at a time, takes a code and its value's bits in one step, and leaves the branches out that no
 * processor can predict. Where the library asks for no coefficients, and in columns that a region does not need, none
 * are stored, and a look-up takes all symbols that it sees whole. What it decodes is ordinary: one scan, no restart
 * markers. At anything odd in the data it gives up: the other decoder judges that, nothing is guessed here. */
#ifndef PIPELINE_DATA_HUFFMAN_H
#define PIPELINE_DATA_HUFFMAN_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

#define LOOK 10 /* bits of a look-up: of 9 to 12 the fastest, because of the cache */
#define MOST_BLOCKS 10

/* What libjpeg-turbo keeps behind jpeg_decompress_struct.entropy, in all its versions: start_pass, then decode_mcu. */
struct entropy {
    void (*start_pass)(j_decompress_ptr);
    boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW *);
};

/* An entry of `look`. From bit 0: bits to take, the value's among them (6), of these the code's (5); from bit 16: the size
 * of the value (4), the run of zeros before it (4). 0 for a code of more than LOOK bits. */
#define TAKE(entry) ((int)(entry) & 63)
#define CODE(entry) ((int)(entry) >> 6 & 31)
#define SIZE(entry) ((int)(entry) >> 16 & 15)
#define RUN(entry) ((int)(entry) >> 20)
#define ENTRY(length, run, size) \
    ((uint32_t)((length) + (size)) | (uint32_t)(length) << 6 | (uint32_t)(size) << 16 | (uint32_t)(run) << 20)

struct codes {
    uint32_t look[1 << LOOK];
    uint16_t pass[1 << LOOK]; /* of AC, all symbols that fit: bits to take (4), if the block ends (1), its coefficients */
    int32_t last[17], offset[17]; /* of each length: the greatest code, or -1; what leads from a code to `symbols` */
    uint8_t symbols[256], counts[17]; /* of each length */
    int made;
};

struct huffman {
    const uint8_t *at, *end;
    uint64_t bits;           /* the next ones, from the top */
    int count;               /* how many; less than none: more were taken than there were */
    int blocks, component[MOST_BLOCKS], previous[MAX_COMPS_IN_SCAN];
    int columns, column, first, last; /* of MCUs; this one; those that are needed */
    const struct codes *dc[MAX_COMPS_IN_SCAN], *ac[MAX_COMPS_IN_SCAN];
};

/* Of DC and of AC. Most files have the same ones, so those of a thread's last file are kept. */
static _Thread_local struct codes kept_codes[2][NUM_HUFF_TBLS];

/* Zigzag to natural order; a run past the end of a block is noticed after it. */
static const uint8_t NATURAL[DCTSIZE2 + 16] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,
    6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31,
    39, 46, 53, 60, 61, 54, 47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63};

/* The value of `size` bits, 1 to 15, at the top of `bits`: those that begin with 0 are negative. */
static inline int value_of(uint64_t bits, int size) {
    int negative = (int)(~bits >> 63);
    return (int)(bits >> (64 - size)) - (-negative & ((1 << size) - 1));
}

#define PASS_ENDS (1 << 4)
#define PASSED(entry) ((entry) >> 5)

static void make_pass(struct codes *codes) {
    for (uint32_t i = 0; i < 1u << LOOK; i++) {
        int taken = 0, passed = 0, ends = 0;
        while (!ends) {
            uint32_t entry = codes->look[i << taken & ((1 << LOOK) - 1)];
            if (!entry || TAKE(entry) > LOOK - taken) break;
            taken += TAKE(entry);
            if (SIZE(entry) || RUN(entry) == 15) passed += RUN(entry) + 1;
            else ends = PASS_ENDS;
        }
        codes->pass[i] = (uint16_t)(taken | ends | passed << 5);
    }
}

/* Whether the table is one that can be decoded with. `dc`: its symbols are sizes. */
static int make_codes(struct codes *codes, const JHUFF_TBL *table, int dc) {
    uint32_t code = 0;
    int symbol = 0;
    if (!table) return 0;
    if (codes->made && !memcmp(codes->counts, table->bits, sizeof codes->counts) &&
        !memcmp(codes->symbols, table->huffval, sizeof codes->symbols))
        return 1;
    codes->made = 0;
    memset(codes->look, 0, sizeof codes->look);
    memcpy(codes->counts, table->bits, sizeof codes->counts);
    memcpy(codes->symbols, table->huffval, sizeof codes->symbols);
    for (int length = 1; length <= 16; length++, code <<= 1) {
        codes->offset[length] = symbol - (int)code;
        for (int i = 0; i < table->bits[length]; i++, code++, symbol++) {
            if (symbol > 255 || code >> length) return 0;
            int value = codes->symbols[symbol], run = dc ? 0 : value >> 4, size = dc ? value : value & 15;
            if (size > 15) return 0;
            int rest = LOOK - length;
            if (rest < 0) continue;
            for (uint32_t after = 0; after < 1u << rest; after++)
                codes->look[code << rest | after] = ENTRY(length, run, size);
        }
        codes->last[length] = table->bits[length] ? (int32_t)code - 1 : -1;
    }
    if (!dc) make_pass(codes);
    codes->made = 1;
    return 1;
}

/* More bits, up to the next marker: there are 56 or more then, or all that there are. */
static inline void fill(const uint8_t **from, const uint8_t *end, uint64_t *bits, int *count) {
    const uint8_t *at = *from;
    if (end - at >= 8) {
        uint64_t next;
        memcpy(&next, at, 8);
        if (!((~next - 0x0101010101010101u) & next & 0x8080808080808080u)) { /* no byte of 0xFF */
            int bytes = (63 - *count) >> 3;
            *bits |= __builtin_bswap64(next) >> *count;
            *from = at + bytes;
            *count += 8 * bytes;
            /* Bits below `count` are those of bytes that come again; they are the same then. */
            return;
        }
    }
    /* Those bits have to go where a byte may be skipped. */
    *bits = *count > 0 ? *bits >> (64 - *count) << (64 - *count) : 0;
    while (*count >= 0 && *count < 56 && at < end) {
        if (*at == 0xFF && (end - at < 2 || at[1] != 0)) break;
        *bits |= (uint64_t)*at << (56 - *count);
        *count += 8;
        at += *at == 0xFF ? 2 : 1;
    }
    *from = at;
}

/* An entry, as of `look`, for a code of any length; 0 where there is no such code. */
static uint32_t long_code(const struct codes *codes, uint64_t bits, int dc) {
    for (int length = LOOK + 1; length <= 16; length++) {
        int32_t code = (int32_t)(bits >> (64 - length));
        if (code > codes->last[length]) continue;
        uint32_t value = codes->symbols[(code + codes->offset[length]) & 255];
        uint32_t run = dc ? 0 : value >> 4, size = dc ? value : value & 15;
        return ENTRY(length, run, size);
    }
    return 0;
}

/* One block, stored if `keep`. Returns whether all was in order. */
static inline __attribute__((always_inline)) int decode_block(struct huffman *huffman, int component, JCOEF *block,
                                                              const int keep) {
    const struct codes *dc = huffman->dc[component], *ac = huffman->ac[component];
    const uint8_t *at = huffman->at, *const end = huffman->end;
    uint64_t bits = huffman->bits;
    int count = huffman->count, k = 1;
    fill(&at, end, &bits, &count);
    uint32_t entry = dc->look[bits >> (64 - LOOK)];
    if (!entry && !(entry = long_code(dc, bits, 1))) return 0;
    if (SIZE(entry)) {
        int value = huffman->previous[component] + value_of(bits << CODE(entry), SIZE(entry));
        if (value != (JCOEF)value) return 0;
        huffman->previous[component] = value;
    }
    bits <<= TAKE(entry), count -= TAKE(entry);
    if (keep) block[0] = (JCOEF)huffman->previous[component];
    while (k < DCTSIZE2) {
        fill(&at, end, &bits, &count);
        if (!keep) {
            for (int times = 0; times < 4; times++) {
                uint32_t pass = ac->pass[bits >> (64 - LOOK)];
                if (!pass || k + (int)PASSED(pass) >= DCTSIZE2) goto one;
                bits <<= pass & 15, count -= (int)(pass & 15);
                k += PASSED(pass);
                if (pass & PASS_ENDS) goto done;
            }
            continue;
        one:
            entry = ac->look[bits >> (64 - LOOK)];
            goto unusual;
        }
        for (int twice = 0; twice < 2; twice++) { /* what was filled in is enough for two codes that are looked up */
            entry = ac->look[bits >> (64 - LOOK)];
            if (__builtin_expect(!SIZE(entry), 0)) goto unusual;
            k += RUN(entry);
            if (keep) block[NATURAL[k]] = (JCOEF)value_of(bits << CODE(entry), SIZE(entry));
            bits <<= TAKE(entry), count -= TAKE(entry);
            if (++k >= DCTSIZE2) break;
        }
        continue;
    unusual:
        if (!entry) {
            fill(&at, end, &bits, &count);
            if (!(entry = long_code(ac, bits, 0))) return 0;
        }
        if (SIZE(entry)) {
            k += RUN(entry);
            if (keep) block[NATURAL[k]] = (JCOEF)value_of(bits << CODE(entry), SIZE(entry));
            k++;
        }
        bits <<= TAKE(entry), count -= TAKE(entry);
        if (SIZE(entry)) continue;
        if (RUN(entry) != 15) break; /* the rest are zeros */
        k += 16;
    }
done:
    huffman->at = at, huffman->bits = bits, huffman->count = count;
    return k <= DCTSIZE2 && count >= 0;
}

/* Whether the next MCU could be decoded. `rows`: where to, a block each, of zeros; or NULL. */
static inline __attribute__((always_inline)) int decode_next(struct huffman *huffman, JBLOCKROW *rows) {
    int column = huffman->column, good = 1;
    huffman->column = column + 1 < huffman->columns ? column + 1 : 0;
    if (rows && column >= huffman->first && column <= huffman->last) {
        for (int i = 0; i < huffman->blocks && good; i++)
            good = decode_block(huffman, huffman->component[i], rows[i][0], 1);
    } else {
        for (int i = 0; i < huffman->blocks && good; i++) good = decode_block(huffman, huffman->component[i], NULL, 0);
    }
    return good;
}

/* To begin at the first MCU of the scan that `jpeg` is about to decode. Returns whether it is of an ordinary kind. */
static int huffman_start(struct huffman *huffman, j_decompress_ptr jpeg) {
    if (jpeg->progressive_mode || jpeg->arith_code || jpeg->restart_interval || jpeg_has_multiple_scans(jpeg) ||
        jpeg->comps_in_scan != jpeg->num_components || jpeg->blocks_in_MCU > MOST_BLOCKS || jpeg->unread_marker)
        return 0;
    for (int c = 0; c < jpeg->comps_in_scan; c++) {
        const jpeg_component_info *component = jpeg->cur_comp_info[c];
        for (int kind = 0; kind < 2; kind++) {
            int number = kind ? component->ac_tbl_no : component->dc_tbl_no;
            if (number < 0 || number >= NUM_HUFF_TBLS) return 0;
            struct codes *codes = &kept_codes[kind][number];
            JHUFF_TBL *table = kind ? jpeg->ac_huff_tbl_ptrs[number] : jpeg->dc_huff_tbl_ptrs[number];
            if (!make_codes(codes, table, !kind)) return 0;
            if (kind) huffman->ac[c] = codes;
            else huffman->dc[c] = codes;
        }
    }
    huffman->blocks = jpeg->blocks_in_MCU;
    for (int i = 0; i < jpeg->blocks_in_MCU; i++) huffman->component[i] = jpeg->MCU_membership[i];
    huffman->columns = (int)jpeg->MCUs_per_row;
    huffman->first = 0, huffman->last = huffman->columns - 1;
    huffman->at = jpeg->src->next_input_byte;
    huffman->end = huffman->at + jpeg->src->bytes_in_buffer;
    return 1;
}

/* What follows the scan is for `jpeg` again. */
static void huffman_end(const struct huffman *huffman, j_decompress_ptr jpeg) {
    jpeg->src->next_input_byte = huffman->at;
    jpeg->src->bytes_in_buffer = (size_t)(huffman->end - huffman->at);
}

#endif
