/* A region of a JPEG, or a region resized to a square, decoding no more than that needs. See decode.py.
 *
 * libjpeg-turbo entropy-decodes what lies above the region and left and right of it, and does the inverse DCT,
 * upsampling and colour conversion for the region alone; below it nothing is read. Its rows go through the horizontal
 * pass while they are in the cache, and through the vertical pass as soon as an output row has all it needs.
 *
 * Resizing has PIL's weights (22 bits of fraction) and PIL's rounding between the passes, so its pixels are PIL's. Sums
 * are in integers: in which order, and with which instructions, does not matter to the result.
 *
 * No function leaves memory, a lock or a Python object behind when libjpeg fails: all of it hangs on a struct job. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#include <jerror.h>

#include "_huffman.h"

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000006
#error "libjpeg-turbo 2.0.6 or later is needed: before, 4:4:0 looks different and skipping rows has defects"
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#define BMI2 __attribute__((target("bmi2")))
#endif

#define MAX_PIXELS (2 * 89478485LL) /* where PIL refuses a decompression bomb */
#define MAX_SCANS 500               /* of a progressive file: a few kilobytes can ask for hours */
#define MARGIN 8                    /* columns of context on each side: upsampling looks one chroma sample away */
#define ROWS 4                      /* that share the loads of weights in the horizontal pass */
#define FRACTION 22                 /* bits of PIL's weights */
#define SPLIT 12                    /* bits in the low half of a weight: both halves fit 16 bits */

enum verdict { DONE, REFUSED, OUTSIDE, NO_MEMORY }; /* REFUSED: for the other decoder, which also judges damage */

struct taps {      /* the weights of a pass: outputs x `step`, padded by zeros to a multiple of 4 */
    int step, most; /* `most`: the greatest count */
    int *first, *count;
    int32_t *weight;
    int16_t *high, *low; /* weight == high * 2^SPLIT + low */
};

struct job {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    struct jpeg_progress_mgr progress;
    jmp_buf escape;
    enum verdict verdict;
    char reason[JMSG_LENGTH_MAX];
    struct taps across, down;
    double *exact;               /* weights before they are rounded */
    uint8_t *rows, *ring, *line; /* decoded rows; rows after the horizontal pass; an output row */
    int skip;                    /* columns of a decoded row before the region */
    int takes_over;              /* whether `huffman` decodes in the library's place */
    struct huffman huffman;
};

/* ---- libjpeg without stderr, exit, or silence about lost data ---- */

static void leave(j_common_ptr jpeg, enum verdict verdict) {
    struct job *job = (struct job *)jpeg->client_data;
    job->verdict = verdict;
    (*jpeg->err->format_message)(jpeg, job->reason);
    longjmp(job->escape, 1);
}

static void on_error(j_common_ptr jpeg) {
    leave(jpeg, jpeg->err->msg_code == JERR_OUT_OF_MEMORY ? NO_MEMORY : REFUSED);
}

static void on_message(j_common_ptr jpeg, int level) {
    if (level >= 0) return;
    switch (jpeg->err->msg_code) { /* the other warnings are about stray bytes and odd headers: nothing is lost */
        case JWRN_JPEG_EOF:
        case JWRN_HIT_MARKER:
        case JWRN_HUFF_BAD_CODE:
        case JWRN_ARITH_BAD_CODE:
        case JWRN_MUST_RESYNC:
        case JWRN_BOGUS_PROGRESSION: leave(jpeg, REFUSED);
    }
}

static void on_output(j_common_ptr jpeg) { (void)jpeg; }

static void give_up(struct job *job, enum verdict verdict, const char *reason) {
    job->verdict = verdict;
    snprintf(job->reason, sizeof job->reason, "%s", reason);
    longjmp(job->escape, 1);
}

static void on_progress(j_common_ptr jpeg) {
    if (((j_decompress_ptr)jpeg)->input_scan_number > MAX_SCANS)
        give_up(jpeg->client_data, REFUSED, "a progressive file of too many scans");
}

static void *need(struct job *job, size_t count, size_t bytes) {
    void *memory = calloc(count, bytes);
    if (!memory) give_up(job, NO_MEMORY, "out of memory");
    return memory;
}

/* Whether the library may be asked at all, by the header alone: baseline, extended or progressive, 8 bits, gray or three
 * colours, and in order up to the first scan. Of other codings it might be asked for a scale that they do not have, on
 * which some versions write past their rows. As data_prep/images/jpeg.py reads headers. */
static int is_ordinary(const uint8_t *data, size_t size, int *height, int *width) {
    int frames = 0;
    if (size < 4 || data[0] != 0xFF || data[1] != 0xD8) return 0;
    for (size_t at = 2; at + 4 <= size && data[at] == 0xFF;) {
        int marker = data[at + 1];
        if (marker == 0xFF) { /* a fill byte */
            at++;
            continue;
        }
        size_t length = (size_t)data[at + 2] << 8 | data[at + 3], end = at + 2 + length;
        if (end > size || length < 2 || marker <= 0x01 || (marker >= 0xD0 && marker <= 0xD9)) return 0;
        if (marker >= 0xC0 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC) {
            if (marker > 0xC2 || frames++ || length < 8 || data[at + 4] != 8) return 0;
            int components = data[at + 9];
            *height = data[at + 5] << 8 | data[at + 6], *width = data[at + 7] << 8 | data[at + 8];
            if ((components != 1 && components != 3) || length != 8 + 3 * (size_t)components) return 0;
        }
        if (marker == 0xDA) return frames;
        at = end;
    }
    return 0;
}

static void open_job(struct job *job, const Py_buffer *data) {
    j_decompress_ptr jpeg = &job->jpeg;
    jpeg->err = jpeg_std_error(&job->errors);
    job->errors.error_exit = on_error;
    job->errors.emit_message = on_message;
    job->errors.output_message = on_output;
    jpeg->client_data = job;
    jpeg_create_decompress(jpeg);
    job->progress.progress_monitor = on_progress;
    jpeg->progress = &job->progress;
    int height, width;
    if (!is_ordinary(data->buf, (size_t)data->len, &height, &width)) give_up(job, REFUSED, "not an ordinary JPEG");
    jpeg_mem_src(jpeg, (const unsigned char *)data->buf, (unsigned long)data->len);
    jpeg_read_header(jpeg, TRUE);
    if ((int64_t)jpeg->image_width * jpeg->image_height > MAX_PIXELS) give_up(job, REFUSED, "too many pixels");
}

static void close_job(struct job *job) {
    struct taps *taps[] = {&job->across, &job->down};
    jpeg_destroy_decompress(&job->jpeg);
    for (int i = 0; i < 2; i++) {
        free(taps[i]->first), free(taps[i]->count), free(taps[i]->weight), free(taps[i]->high), free(taps[i]->low);
    }
    free(job->exact), free(job->rows), free(job->ring), free(job->line);
}

static boolean decode_mcu(j_decompress_ptr jpeg, JBLOCKROW *rows) {
    struct job *job = jpeg->client_data;
    if (!decode_next(&job->huffman, rows)) give_up(job, REFUSED, "data out of order");
    return TRUE;
}

#ifdef AVX2
/* The same; shifts by a variable count are shorter. */
BMI2 static boolean decode_mcu_bmi2(j_decompress_ptr jpeg, JBLOCKROW *rows) {
    struct job *job = jpeg->client_data;
    if (!decode_next(&job->huffman, rows)) give_up(job, REFUSED, "data out of order");
    return TRUE;
}
#endif

/* Start decoding at 1/scale so that the next row read is `top`, and the region begins `skip` columns into it; these
 * are pixels of the scaled image. */
static void start(struct job *job, int top, int left, int height, int width, int scale, J_COLOR_SPACE colors) {
    j_decompress_ptr jpeg = &job->jpeg;
    jpeg->dct_method = JDCT_ISLOW;
    jpeg->do_fancy_upsampling = TRUE;
    jpeg->out_color_space = colors;
    jpeg->scale_num = 1;
    jpeg->scale_denom = (unsigned)scale;
    jpeg_start_decompress(jpeg);
    if (jpeg->progressive_mode && jpeg->coef_bits) /* unfinished: what is missing gets guessed, from neighbours too */
        for (int c = 0; c < jpeg->num_components; c++)
            for (int i = 0; i < DCTSIZE2; i++)
                if (jpeg->coef_bits[c][i]) give_up(job, REFUSED, "a progressive file without all of its scans");
    int all = (int)jpeg->output_width;
    if (all != ((int)jpeg->image_width + scale - 1) / scale || left + width > all ||
        top + height > (int)jpeg->output_height)
        give_up(job, REFUSED, "scaled to another size than expected");
    if ((job->takes_over = huffman_start(&job->huffman, jpeg))) {
        ((struct entropy *)jpeg->entropy)->decode_mcu = decode_mcu;
#ifdef AVX2
        if (__builtin_cpu_supports("bmi2")) ((struct entropy *)jpeg->entropy)->decode_mcu = decode_mcu_bmi2;
#endif
    }
    int from = left > MARGIN ? left - MARGIN : 0, to = left + width + MARGIN < all ? left + width + MARGIN : all;
    job->skip = left;
    if (from > 0 || to < all) {
        JDIMENSION offset = (JDIMENSION)from, count = (JDIMENSION)(to - from);
        jpeg_crop_scanline(jpeg, &offset, &count);
        job->skip = left - (int)offset;
        int mcu = DCTSIZE * (jpeg->num_components == 1 ? 1 : jpeg->max_h_samp_factor) / scale; /* its columns */
        job->huffman.first = (int)offset / mcu;
        job->huffman.last = (to - 1) / mcu;
        if (job->skip < 0 || job->skip + width > (int)jpeg->output_width) give_up(job, REFUSED, "cropped elsewhere");
    }
    if (top > 0 && jpeg_skip_scanlines(jpeg, (JDIMENSION)top) != (JDIMENSION)top)
        give_up(job, REFUSED, "skipped other rows");
}

/* Up to `count` (at most ROWS) rows of `stride` bytes into job->rows. */
static void read_rows(struct job *job, int count, size_t stride) {
    JSAMPROW rows[ROWS];
    for (int i = 0; i < ROWS; i++) rows[i] = job->rows + i * stride;
    for (int got = 0; got < count;) {
        int more = (int)jpeg_read_scanlines(&job->jpeg, rows + got, (JDIMENSION)(count - got));
        if (more <= 0) give_up(job, REFUSED, "the rows end early");
        got += more;
    }
}

static void finish(struct job *job) { /* a file that ends without saying so is cut short: PIL refuses it as well */
    if (job->jpeg.output_scanline < job->jpeg.output_height) return;
    if (job->takes_over) huffman_end(&job->huffman, &job->jpeg);
    jpeg_finish_decompress(&job->jpeg);
}

/* ---- resizing ---- */

static double triangle(double x) { return (x = fabs(x)) < 1 ? 1 - x : 0; }

static double cubic(double x) { /* Keys, a = -1/2 */
    x = fabs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/* Weights for `outputs` pixels from [begin, end), in pixels of a row of `inputs`; `flip`: in reverse order. `whole`: all
 * `step` of an output's inputs may be read, so those at the end begin before their first weight that is not 0. */
static void make_taps(struct job *job, struct taps *taps, int inputs, double begin, double end, int outputs,
                      int bicubic, int flip, int whole) {
    double (*filter)(double) = bicubic ? cubic : triangle;
    double scale = (end - begin) / outputs, stretch = scale < 1 ? 1 : scale, squeeze = 1 / stretch;
    double support = (bicubic ? 2 : 1) * stretch;
    taps->first = need(job, (size_t)outputs, sizeof *taps->first);
    taps->count = need(job, (size_t)outputs, sizeof *taps->count);
    for (int i = 0; i < outputs; i++) {
        double center = begin + (i + 0.5) * scale;
        int at = flip ? outputs - 1 - i : i;
        int first = (int)(center - support + 0.5), last = (int)(center + support + 0.5);
        taps->first[at] = first < 0 ? 0 : first;
        taps->count[at] = (last > inputs ? inputs : last) - taps->first[at];
        if (taps->count[at] > taps->most) taps->most = taps->count[at];
    }
    taps->step = (taps->most + 3) & ~3;
    size_t all = (size_t)outputs * (size_t)taps->step;
    taps->weight = need(job, all, sizeof *taps->weight);
    taps->high = need(job, all, sizeof *taps->high);
    taps->low = need(job, all, sizeof *taps->low);
    double *exact = job->exact = need(job, (size_t)taps->step, sizeof *exact);
    int latest = inputs > taps->step ? inputs - taps->step : 0; /* place to begin at, where `whole` */
    for (int i = 0; i < outputs; i++) {
        double center = begin + (i + 0.5) * scale, sum = 0;
        int at = flip ? outputs - 1 - i : i, first = taps->first[at], count = taps->count[at];
        int early = whole && first > latest ? first - latest : 0;
        size_t place = (size_t)at * (size_t)taps->step + (size_t)early;
        for (int k = 0; k < count; k++) sum += exact[k] = filter((k + first - center + 0.5) * squeeze);
        for (int k = 0; k < count; k++, place++) {
            double weight = (sum != 0 ? exact[k] / sum : exact[k]) * (1 << FRACTION);
            int32_t rounded = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
            taps->weight[place] = rounded;
            taps->high[place] = (int16_t)((rounded + (1 << (SPLIT - 1))) >> SPLIT);
            taps->low[place] = (int16_t)(rounded - taps->high[place] * (1 << SPLIT));
        }
        taps->first[at] = first - early;
        taps->count[at] = count + early;
    }
    free(job->exact);
    job->exact = NULL;
}

static uint8_t clip(uint32_t sum) { /* unsigned, because the halves of a sum may overflow though the sum does not */
    int32_t value = (int32_t)(sum + (1u << (FRACTION - 1))) >> FRACTION;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* ROWS rows of RGBX, `stride` bytes apart, to rows of RGB. */
static void horizontal(const struct taps *taps, int outputs, const uint8_t *rows, size_t stride, uint8_t *const *to) {
    for (int row = 0; row < ROWS; row++, rows += stride)
        for (int i = 0; i < outputs; i++) {
            const int32_t *weight = taps->weight + (size_t)i * (size_t)taps->step;
            const uint8_t *from = rows + 4 * (size_t)taps->first[i];
            uint32_t red = 0, green = 0, blue = 0;
            for (int k = 0; k < taps->count[i]; k++, from += 4) {
                uint32_t w = (uint32_t)weight[k];
                red += w * from[0], green += w * from[1], blue += w * from[2];
            }
            to[row][3 * i] = clip(red), to[row][3 * i + 1] = clip(green), to[row][3 * i + 2] = clip(blue);
        }
}

/* One output row of `bytes`, from the rows [first, first + count) of the ring. */
static void vertical(const int32_t *weight, int first, int count, const uint8_t *ring, int slots, size_t stride,
                     size_t bytes, uint8_t *to) {
    for (size_t at = 0; at < bytes; at += 32) { /* rows are padded to a multiple of 32 */
        uint32_t sums[32] = {0};
        for (int k = 0; k < count; k++) {
            const uint8_t *from = ring + (size_t)((first + k) % slots) * stride + at;
            for (int i = 0; i < 32; i++) sums[i] += (uint32_t)weight[k] * from[i];
        }
        for (int i = 0; i < 32; i++) to[at + (size_t)i] = clip(sums[i]);
    }
}

#ifdef AVX2
AVX2 static inline __m256i join(__m256i high, __m256i low) {
    return _mm256_add_epi32(_mm256_slli_epi32(high, SPLIT), low);
}

/* A pixel of RGB and a byte that the next pixel overwrites; rows are padded. */
static inline void put(uint8_t *to, int rgbx) { memcpy(to, &rgbx, 4); }

/* As `horizontal`. `quads`: of taps, the same for all outputs, so that no branch is mispredicted; mostly known to the
 * compiler. */
AVX2 static inline __attribute__((always_inline)) void quads_avx2(const struct taps *taps, int outputs,
                                                                  const uint8_t *rows, size_t stride,
                                                                  uint8_t *const *to, const int quads) {
    /* Four pixels, RGBX each, to 16 bits, a colour's four side by side: madd adds up two and two. */
    const __m256i pixels = _mm256_setr_epi8(0, -1, 4, -1, 8, -1, 12, -1, 1, -1, 5, -1, 9, -1, 13, -1, 2, -1, 6, -1, 10,
                                            -1, 14, -1, 3, -1, 7, -1, 11, -1, 15, -1);
    const __m256i half = _mm256_set1_epi64x(1 << (FRACTION - 1)); /* once for each two of these sums */
    /* Copies, because bytes that are written might alias anything. */
    const int *first = taps->first;
    const int16_t *high = taps->high, *low = taps->low;
    uint8_t *to0 = to[0], *to1 = to[1], *to2 = to[2], *to3 = to[3];
    for (int i = 0; i < outputs; i++, high += 4 * quads, low += 4 * quads, to0 += 3, to1 += 3, to2 += 3, to3 += 3) {
        const uint8_t *from = rows + 4 * (size_t)first[i];
        __m256i highs[ROWS], lows[ROWS];
        for (int row = 0; row < ROWS; row++) highs[row] = _mm256_setzero_si256(), lows[row] = half;
        for (int quad = 0; quad < quads; quad++) {
            __m256i h = _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)(high + 4 * quad)));
            __m256i l = _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)(low + 4 * quad)));
            for (int row = 0; row < ROWS; row++) {
                __m128i four = _mm_loadu_si128((const __m128i *)(from + (size_t)row * stride + 16 * quad));
                __m256i wide = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(four), pixels);
                highs[row] = _mm256_add_epi32(highs[row], _mm256_madd_epi16(wide, h));
                lows[row] = _mm256_add_epi32(lows[row], _mm256_madd_epi16(wide, l));
            }
        }
        for (int row = 0; row < ROWS; row++) highs[row] = join(highs[row], lows[row]);
        /* Red and green of two rows, then their blue. */
        __m256i upper = _mm256_srai_epi32(_mm256_hadd_epi32(highs[0], highs[1]), FRACTION);
        __m256i lower = _mm256_srai_epi32(_mm256_hadd_epi32(highs[2], highs[3]), FRACTION);
        __m256i words = _mm256_packs_epi32(upper, lower), bytes = _mm256_packus_epi16(words, words);
        __m128i all = _mm_unpacklo_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
        put(to0, _mm_extract_epi32(all, 0)), put(to1, _mm_extract_epi32(all, 1));
        put(to2, _mm_extract_epi32(all, 2)), put(to3, _mm_extract_epi32(all, 3));
    }
}

AVX2 static void horizontal_avx2(const struct taps *taps, int outputs, const uint8_t *rows, size_t stride,
                                 uint8_t *const *to) {
    switch (taps->step / 4) {
        case 1: quads_avx2(taps, outputs, rows, stride, to, 1); break;
        case 2: quads_avx2(taps, outputs, rows, stride, to, 2); break;
        case 3: quads_avx2(taps, outputs, rows, stride, to, 3); break;
        case 4: quads_avx2(taps, outputs, rows, stride, to, 4); break;
        default: quads_avx2(taps, outputs, rows, stride, to, taps->step / 4);
    }
}

/* As `vertical`. `pairs`: of taps, mostly known to the compiler; an odd one gets a partner of weight 0. */
AVX2 static inline __attribute__((always_inline)) void pairs_avx2(const int16_t *high, const int16_t *low, int first,
                                                                  const uint8_t *ring, int slots, size_t stride,
                                                                  size_t bytes, uint8_t *to, const int pairs) {
    const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << (FRACTION - 1));
    for (size_t at = 0; at < bytes; at += 32) {
        __m256i highs[4] = {zero, zero, zero, zero}, lows[4] = {half, half, half, half};
        for (int k = 0, slot = first % slots; k < 2 * pairs; k += 2) {
            int next = slot + 1 < slots ? slot + 1 : 0, pair;
            memcpy(&pair, high + k, 4);
            __m256i h = _mm256_set1_epi32(pair);
            memcpy(&pair, low + k, 4);
            __m256i l = _mm256_set1_epi32(pair);
            __m256i one = _mm256_loadu_si256((const __m256i *)(ring + (size_t)slot * stride + at));
            __m256i two = _mm256_loadu_si256((const __m256i *)(ring + (size_t)next * stride + at));
            __m256i left = _mm256_unpacklo_epi8(one, two), right = _mm256_unpackhi_epi8(one, two);
            __m256i wide[4] = {_mm256_unpacklo_epi8(left, zero), _mm256_unpackhi_epi8(left, zero),
                               _mm256_unpacklo_epi8(right, zero), _mm256_unpackhi_epi8(right, zero)};
            for (int i = 0; i < 4; i++) {
                highs[i] = _mm256_add_epi32(highs[i], _mm256_madd_epi16(wide[i], h));
                lows[i] = _mm256_add_epi32(lows[i], _mm256_madd_epi16(wide[i], l));
            }
            slot = next + 1 < slots ? next + 1 : 0;
        }
        for (int i = 0; i < 4; i++) highs[i] = _mm256_srai_epi32(join(highs[i], lows[i]), FRACTION);
        __m256i words = _mm256_packs_epi32(highs[0], highs[1]), more = _mm256_packs_epi32(highs[2], highs[3]);
        _mm256_storeu_si256((__m256i *)(to + at), _mm256_packus_epi16(words, more));
    }
}

AVX2 static void vertical_avx2(const int16_t *high, const int16_t *low, int first, int count, const uint8_t *ring,
                               int slots, size_t stride, size_t bytes, uint8_t *to) {
    switch ((count + 1) / 2) {
        case 1: pairs_avx2(high, low, first, ring, slots, stride, bytes, to, 1); break;
        case 2: pairs_avx2(high, low, first, ring, slots, stride, bytes, to, 2); break;
        case 3: pairs_avx2(high, low, first, ring, slots, stride, bytes, to, 3); break;
        case 4: pairs_avx2(high, low, first, ring, slots, stride, bytes, to, 4); break;
        default: pairs_avx2(high, low, first, ring, slots, stride, bytes, to, (count + 1) / 2);
    }
}
#endif

static void resize(struct job *job, int height, int size, size_t row_stride, uint8_t *out) {
    const size_t bytes = 3 * (size_t)size, padded = (bytes + 31) & ~(size_t)31, stride = padded + 32;
    size_t left = bytes * (size_t)size; /* bytes of `out` */
    const int slots = job->down.most + ROWS;
    int ready = 0, done = 0, avx2 = 0;
#ifdef AVX2
    avx2 = __builtin_cpu_supports("avx2");
#endif
    job->ring = need(job, (size_t)slots, stride);
    job->line = need(job, 1, stride);
    while (done < size) {
        uint8_t *to[ROWS];
        int more = height - ready < ROWS ? height - ready : ROWS;
        read_rows(job, more, row_stride);
        for (int i = 0; i < ROWS; i++) to[i] = job->ring + (size_t)((ready + i) % slots) * stride;
        const uint8_t *from = job->rows + 4 * (size_t)job->skip;
#ifdef AVX2
        if (avx2) horizontal_avx2(&job->across, size, from, row_stride, to);
#endif
        if (!avx2) horizontal(&job->across, size, from, row_stride, to);
        for (ready += more; done < size && job->down.first[done] + job->down.count[done] <= ready; done++) {
            size_t base = (size_t)done * (size_t)job->down.step;
            int first = job->down.first[done], count = job->down.count[done];
            /* Blocks of 32 bytes may go past the end of the row: into the next, which is yet to come. */
            uint8_t *row = out + (size_t)done * bytes, *line = padded <= left ? row : job->line;
#ifdef AVX2
            if (avx2)
                vertical_avx2(job->down.high + base, job->down.low + base, first, count, job->ring, slots, stride,
                              bytes, line);
#endif
            if (!avx2) vertical(job->down.weight + base, first, count, job->ring, slots, stride, bytes, line);
            if (line != row) memcpy(row, line, bytes);
            left -= bytes;
        }
    }
}

/* ---- Python ---- */

static PyObject *report(enum verdict verdict, const char *reason) {
    if (verdict == DONE) Py_RETURN_NONE;
    if (verdict == NO_MEMORY) return PyErr_NoMemory();
    return Py_BuildValue("is", (int)verdict, reason);
}

static PyObject *run(const Py_buffer *data, const Py_buffer *out, const int box[4], int size, int scale, int bicubic,
                     int flip) {
    const int top = box[0], left = box[1], height = box[2], width = box[3];
    enum verdict verdict = DONE;
    char reason[JMSG_LENGTH_MAX] = "";
    struct job *job = calloc(1, sizeof *job);
    if (!job) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    if (!setjmp(job->escape)) {
        open_job(job, data);
        int image_height = (int)job->jpeg.image_height, image_width = (int)job->jpeg.image_width;
        if (top < 0 || left < 0 || height < 1 || width < 1 || height > image_height || width > image_width ||
            top > image_height - height || left > image_width - width) {
            char text[JMSG_LENGTH_MAX];
            snprintf(text, sizeof text,
                     "region (top, left, height, width) (%d, %d, %d, %d) is not inside of the image of %d x %d", top,
                     left, height, width, image_height, image_width);
            give_up(job, OUTSIDE, text);
        }
        /* Whole pixels of the scaled image around the region, and the region's place in them. */
        int first_row = top / scale, first_column = left / scale;
        int rows = (top + height + scale - 1) / scale - first_row;
        int columns = (left + width + scale - 1) / scale - first_column;
        start(job, first_row, first_column, rows, columns, scale, size ? JCS_EXT_RGBX : JCS_EXT_RGB);
        if (size) {
            double y = (double)top / scale - first_row, x = (double)left / scale - first_column;
            make_taps(job, &job->across, columns, x, x + (double)width / scale, size, bicubic, flip, 1);
            make_taps(job, &job->down, rows, y, y + (double)height / scale, size, bicubic, 0, 0);
            /* Loads of four pixels may go past the end of a row, by weights of 0. */
            size_t stride = 4 * (size_t)job->jpeg.output_width + 64;
            job->rows = need(job, ROWS, stride);
            resize(job, rows, size, stride, out->buf);
        } else {
            size_t stride = 3 * (size_t)job->jpeg.output_width, bytes = 3 * (size_t)width;
            job->rows = need(job, ROWS, stride);
            for (int row = 0; row < height; row++) {
                read_rows(job, 1, stride);
                memcpy((uint8_t *)out->buf + (size_t)row * bytes, job->rows + 3 * (size_t)job->skip, bytes);
            }
        }
        finish(job);
    }
    verdict = job->verdict;
    memcpy(reason, job->reason, sizeof reason);
    close_job(job);
    free(job);
    Py_END_ALLOW_THREADS
    return report(verdict, reason);
}

static PyObject *py_region(PyObject *self, PyObject *args) {
    Py_buffer data, out;
    int box[4];
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*w*iiii", &data, &out, box, box + 1, box + 2, box + 3)) return NULL;
    if (box[2] < 1 || box[3] < 1 || (int64_t)box[2] * box[3] > MAX_PIXELS || out.len != (int64_t)box[2] * box[3] * 3)
        PyErr_SetString(PyExc_ValueError, "out is not of the region's size");
    else
        result = run(&data, &out, box, 0, 1, 0, 0);
    PyBuffer_Release(&data), PyBuffer_Release(&out);
    return result;
}

static PyObject *py_crop_resize(PyObject *self, PyObject *args) {
    Py_buffer data, out;
    int box[4], size, scale, bicubic, flip;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*w*iiiiiipp", &data, &out, box, box + 1, box + 2, box + 3, &size, &scale, &bicubic,
                          &flip))
        return NULL;
    if (size < 1 || size > JPEG_MAX_DIMENSION || out.len != (int64_t)size * size * 3)
        PyErr_SetString(PyExc_ValueError, "out is not (size, size, 3)");
    else if (scale != 1 && scale != 2 && scale != 4 && scale != 8)
        PyErr_SetString(PyExc_ValueError, "scale is not 1, 2, 4 or 8");
    else
        result = run(&data, &out, box, size, scale, bicubic, flip);
    PyBuffer_Release(&data), PyBuffer_Release(&out);
    return result;
}

static PyObject *py_size(PyObject *self, PyObject *args) {
    Py_buffer data;
    volatile int height = 0, width = 0;
    struct job *job;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*", &data)) return NULL;
    if (!(job = calloc(1, sizeof *job))) return PyBuffer_Release(&data), PyErr_NoMemory();
    if (!setjmp(job->escape)) {
        open_job(job, &data);
        height = (int)job->jpeg.image_height, width = (int)job->jpeg.image_width;
    }
    enum verdict verdict = job->verdict;
    close_job(job);
    free(job);
    PyBuffer_Release(&data);
    if (verdict == DONE) return Py_BuildValue("ii", height, width);
    return report(verdict == NO_MEMORY ? verdict : DONE, "");
}

static int on_import(PyObject *module) {
    return PyModule_AddIntMacro(module, OUTSIDE) ? -1 : 0;
}

static PyMethodDef methods[] = {
    {"size", py_size, METH_VARARGS, "size(data) -> (height, width), or None for what this module does not decode"},
    {"region", py_region, METH_VARARGS,
     "region(data, out, top, left, height, width) -> None, or (kind, reason) where `out` is not to be used"},
    {"crop_resize", py_crop_resize, METH_VARARGS,
     "crop_resize(data, out, top, left, height, width, size, scale, bicubic, flip) -> as region()"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)on_import}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_jpeg", "Regions of JPEGs with libjpeg-turbo; for decode.py.", 0, methods, slots,
    NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpeg(void) { return PyModuleDef_Init(&definition); }
