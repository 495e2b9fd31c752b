/* Decode a region of a JPEG: the bits of a full decode, without the pixels that nobody looks at. */
#include <setjmp.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

/* Rows and columns around the region: upsampling mixes each chroma sample (two pixels) with its neighbour. */
#define GUARD 4

struct failure {
  struct jpeg_error_mgr base;
  jmp_buf back;
};

static void give_up(j_common_ptr info) { longjmp(((struct failure *)info->err)->back, 1); }

/* A warning means damaged data; what libjpeg makes up in their place is not the image. */
static void on_message(j_common_ptr info, int level) {
  if (level < 0) give_up(info);
}

const char *dist_trainer_libjpeg(void) {
#ifdef LIBJPEG_TURBO_VERSION
#define TEXT(x) #x
#define VALUE(x) TEXT(x)
  return "libjpeg-turbo " VALUE(LIBJPEG_TURBO_VERSION);
#else
  return "";
#endif
}

/* Columns [left, left + width) and rows [top, top + height) of a JPEG into `pixels`, row by row without gaps.
 *
 * channels 3: R, G, B; channels 1: the grey. Returns 0, or 1 for data that are damaged or that another decoder has
 * to read.
 */
int dist_trainer_decode_region(const unsigned char *data, unsigned long length, int channels, int left, int top,
                               int width, int height, unsigned char *pixels) {
  struct jpeg_decompress_struct info;
  struct failure failure;
  info.err = jpeg_std_error(&failure.base);
  failure.base.error_exit = give_up;
  failure.base.emit_message = on_message;
  if (setjmp(failure.back)) {
    jpeg_destroy_decompress(&info);
    return 1;
  }
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, (unsigned char *)data, length);
  jpeg_read_header(&info, TRUE);
  int is_readable = info.jpeg_color_space == JCS_GRAYSCALE || info.jpeg_color_space == JCS_YCbCr;
  if (!is_readable || left < 0 || top < 0 || width < 1 || height < 1 ||
      (long)left + width > (long)info.image_width || (long)top + height > (long)info.image_height) {
    jpeg_destroy_decompress(&info);
    return 1;
  }
  info.out_color_space = channels == 1 ? JCS_GRAYSCALE : JCS_RGB;
  jpeg_start_decompress(&info);
  JDIMENSION first = left > GUARD ? left - GUARD : 0, end = left + width + GUARD;
  JDIMENSION wide = (end < info.output_width ? end : info.output_width) - first;
  jpeg_crop_scanline(&info, &first, &wide); /* moves `first` down to a block's edge */
  size_t depth = channels == 1 ? 1 : 3, row = width * depth, skip = (left - first) * depth;
  JSAMPARRAY line = info.mem->alloc_sarray((j_common_ptr)&info, JPOOL_IMAGE, wide * depth, 1);
  /* Rows above are decoded as well: skipping starts the upsampler anew. */
  if (top > GUARD) jpeg_skip_scanlines(&info, top - GUARD);
  while ((long)info.output_scanline < (long)top + height) {
    long number = (long)info.output_scanline - top;
    jpeg_read_scanlines(&info, line, 1);
    if (number >= 0) memcpy(pixels + number * row, line[0] + skip, row);
  }
  jpeg_destroy_decompress(&info); /* not finish: what follows the region is not read */
  return 0;
}
